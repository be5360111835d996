"""``report``: what runs are called, whose they are, and a page from them."""

from __future__ import annotations

import json

import pytest

import xdfast
from xdfast.pipeline.report import method_of, records_of

SMALL = {
    "data": "sklearn:digits", "labels_per_class": 8, "student_size": 32, "epochs": 1, "batch_size": 40, "augment": "none",
    "optimizer": "adamw", "lr": 1e-3, "workers": 0, "progress": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("report")
    teacher = xdfast.finetune("test_vit", out=str(out / "teacher"), **SMALL)
    distilled = xdfast.distill(
        teacher=teacher,
        student="test_resnet",
        loss="rsd+kd",
        student_options={"drop_rate": 0.1},
        out=str(out / "d"),
        **SMALL,
    )
    return {
        "teacher": teacher,
        "distilled": distilled,
        "tuned": xdfast.finetune(distilled, out=str(out / "t"), **SMALL),
        "scratch": xdfast.finetune("test_resnet", out=str(out / "s"), **SMALL),
    }


def test_names_of_methods(runs) -> None:
    names = {key: method_of(run) for key, run in runs.items()}
    assert names == {
        "teacher": "from scratch",
        "distilled": "RSD + KD",
        "tuned": "RSD + KD → fine-tuned",
        "scratch": "from scratch",
    }


def test_a_fine_tuned_run_knows_the_stage_before_it(runs) -> None:
    (record,) = records_of([runs["tuned"]])
    assert record.steps == 4  # two epochs of 80 images, 40 at a time: distilled, then fine-tuned
    assert record.config["student_options"] == {"drop_rate": 0.1}
    assert 0 < record.metrics["cka"] <= 1  # to the teacher of the first stage


def test_page_and_json(runs, tmp_path) -> None:
    page = xdfast.report(
        [runs["tuned"], str(runs["scratch"].path)],
        out=tmp_path / "r.html",
        title="A < B",
        measure_speed=False,
        notes=["seen"],
    )
    text, data = page.path.read_text(encoding="utf-8"), json.loads(page.json_path.read_text(encoding="utf-8"))
    assert "A &lt; B" in text and "seen" in text and "http-equiv" not in text
    assert {row["role"] for row in data["cost"]} == {"teacher", "student"}
    assert [row["method"] for row in data["accuracy"]] == ["RSD + KD → fine-tuned", "from scratch"]


def test_the_accuracy_of_an_architecture_is_a_mean_over_seeds_not_the_luckiest_run(runs, tmp_path) -> None:
    again = xdfast.finetune("test_resnet", out=str(tmp_path / "s1"), **{**SMALL, "seed": 1})
    page = xdfast.report([runs["scratch"], again], out=tmp_path / "r.html", measure_speed=False)
    mean = (runs["scratch"].metrics["top1"] + again.metrics["top1"]) / 2
    (student,) = (row for row in page.data["cost"] if row["role"] == "student")
    assert student["top1"] == pytest.approx(mean, abs=1e-6)  # training and evaluation count in different precision


def test_no_runs_or_no_run_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one finished run"):
        xdfast.report([])
    with pytest.raises(FileNotFoundError, match="no run"):
        xdfast.report(tmp_path)
