"""CKA maps, saliency and robustness on the page: figures in, tables and pictures out, odd cases told."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xdfast.models import create_model
from xdfast.reporting import Analysis, ModelRecord, RunRecord, build_report
from xdfast.reporting.analysis_page import robustness_table
from xdfast.reporting.groups import group_runs

NAMES = ("fog", "shot_noise")


def robust(clean: float) -> dict:
    accuracy = {"fog": [clean - 0.05 * s for s in range(1, 6)], "shot_noise": [clean - 0.1 * s for s in range(1, 6)]}
    mean = float(np.mean([v for values in accuracy.values() for v in values]))
    return {"clean": clean, "accuracy": accuracy, "mean": mean, "images": 40, "size": 32}


def cka(**changes) -> dict:
    after = [[0.1, 0.2, -0.01], [0.4, 0.9, 0.8]]
    values = {"rows": ["layer1.0", "pooled features"], "columns": ["blocks.0", "blocks.1", "pooled features"]}
    return {
        **values,
        "before": [[0.1, None, 0.1], [0.2, 0.3, 0.4]],
        "after": after,
        "images": 40,
        "batch": 20,
        "teacher": "ViT",
        **changes,
    }


def look(right) -> dict:
    maps = np.zeros((2, 32, 32), dtype=np.float32)
    maps[:, 8:16, 8:16] = 1
    return {"maps": maps, "method": "Grad-CAM at layer1", "said": ["cat", "a<b"], "right": right}


def record(method: str, seed: int, clean: float, **analysis) -> RunRecord:
    measured = robust(clean)
    return RunRecord(
        f"{method}-{seed}", method, seed, "distill", {"top1": clean, "corrupted": measured["mean"]}, classes=["cat", "a<b"],
        config={"data": "d"}, model_name="test_resnet", steps=10, analysis={"robustness": measured, **analysis},
    )  # fmt: skip


def page(tmp_path, records, **fields):
    net = create_model("test_vit", pretrained=False, image_size=32)
    teacher = ModelRecord("ViT", net, 32, "teacher", 0.9, {"robustness": robust(0.9), "saliency": look([True, False])})
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = Analysis(
        ["cka", "saliency", "robustness"], frames, ["cat", "a<b"], [{"key": {"a": 1}, "values": {"b": 2}}], **fields
    )
    return build_report(records, [teacher], tmp_path / "r.html", measure_speed=False, analysis=found)


def test_the_whole_part(tmp_path) -> None:
    extra = {"cka": cka(), "saliency": look([True, True])}
    records = [record("RSD", s, 0.8 + 0.01 * s, **extra) for s in range(2)] + [
        record("from scratch", s, 0.7) for s in range(2)
    ]
    report = page(tmp_path, records, remarks=["One thing was left out."])
    text = report.path.read_text(encoding="utf-8")
    assert text.count('id="cka"') == text.count('id="looks"') == text.count('id="robustness"') == 1
    assert "CKA to ViT: RSD" in text and "One thing was left out." in text and "a&lt;b" in text and "a<b" not in text
    data = json.loads(report.json_path.read_text(encoding="utf-8"))["analysis"]
    assert data == report.data["analysis"] and data["measurements"] == [{"key": {"a": 1}, "values": {"b": 2}}]
    (told,) = data["cka"]
    assert told["last_after"] == 0.8 and told["mean_before"] == pytest.approx(np.mean([0.1, 0.1, 0.2, 0.3, 0.4]))
    assert [row["label"] for row in data["robustness"]] == ["ViT (teacher)", "RSD", "from scratch"]
    assert [row["name"] for row in data["saliency"]] == ["ViT (teacher)", "RSD"] and "maps" not in data["saliency"][0]


def test_figures_of_the_table_by_hand() -> None:
    records = [record("RSD", s, 0.8 + 0.02 * s) for s in range(2)] + [record("from scratch", s, 0.7) for s in range(2)]
    ours, scratch = robustness_table(group_runs(records)[0])
    # two corruptions that cost 5 and 10 points per severity: 7.5 on average, 22.5 over all severities
    assert ours["clean"]["mean"] == pytest.approx(0.81) and ours["n"] == 2
    assert [v["mean"] for v in ours["severities"]] == pytest.approx([0.81 - 0.075 * s for s in range(1, 6)])
    assert ours["corrupted"]["mean"] == pytest.approx(0.81 - 0.225)
    assert ours["corruptions"] == pytest.approx({"fog": 0.81 - 0.15, "shot_noise": 0.81 - 0.3})
    assert ours["lowest"][0] == pytest.approx(0.8) and ours["highest"][5] == pytest.approx(0.82 - 0.375)
    assert (
        ours["to_scratch"]["mean"] == pytest.approx(0.11)
        and ours["to_scratch"]["paired"]
        and scratch["to_scratch"] is None
    )


def test_without_a_start_and_with_a_silent_layer(tmp_path) -> None:
    silent = cka(before=None, after=[[None, None, None], [0.4, None, 0.8]])
    report = page(tmp_path, [record("RSD", 0, 0.8, cka=silent)])
    text = report.path.read_text(encoding="utf-8")
    assert "could not be made again" in text and "says the same of every image" in text
    assert report.data["analysis"]["cka"][0]["mean_before"] is None


def test_no_analysis_no_section(tmp_path) -> None:
    report = build_report([record("RSD", 0, 0.8)], [], tmp_path / "r.html", measure_speed=False)
    assert "analysis" not in report.data and 'id="robustness"' not in report.path.read_text(encoding="utf-8")
