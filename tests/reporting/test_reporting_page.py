"""The page and the JSON: complete, self-contained, escaped, and there in every odd case."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from torch import nn

from xdfast.models import create_model
from xdfast.reporting import ModelRecord, RunRecord, build_report


def record(method="RSD", seed: int | None = 0, top1: float | None = 0.8, classes=("a", "b"), **fields) -> RunRecord:
    count = len(classes)
    rng = np.random.default_rng(seed or 0)
    labels = np.arange(24) % max(count, 1)
    values = {
        "history": [{"kind": "val", "epoch": e, "step": e, "top1": 0.4 * e} for e in range(3)],
        "confusion": (np.eye(count, dtype=int) * 9 + 1).tolist(),
        "classes": list(classes),
        "embedding": {"features": rng.normal(size=(24, 5)), "labels": labels, "predictions": labels},
        "config": {"data": "digits", "lr": 0.1, "seed": seed},
        "model_name": "test_resnet",
    }
    metrics = {} if top1 is None else {"top1": top1, "loss": 0.5}
    return RunRecord(f"{method}-{seed}", method, seed, "distill", metrics, **{**values, **fields})


def net(size=32, **settings) -> nn.Module:
    return create_model("test_resnet", pretrained=False, image_size=size, **settings)


class Tags(HTMLParser):
    """Finds what is not closed, and what would be loaded."""

    VOID = frozenset({"meta", "br", "link", "img", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        self.loaded += [tag] if tag in ("script", "link", "iframe") else []

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def read(report) -> str:
    page = report.path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.loaded == []
    assert "url(http" not in page and "@import" not in page
    assert json.loads(report.json_path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == report.data
    return page


def test_the_whole_page(tmp_path) -> None:
    records = [record(m, s, 0.8 + 0.01 * s + 0.02 * (m == "RSD")) for m in ("RSD", "from scratch") for s in range(2)]
    records[0].skipped = {"cats/1.png": "truncated"}
    models = [
        ModelRecord("test_resnet", net(64), 64, "teacher", 0.9),
        ModelRecord("test_resnet", net(), 32, "student", 0.83),
    ]
    report = build_report(
        records, models, tmp_path / "new" / "page.html", batch_sizes=(1, 2), seconds=0.5, notes=["A note."], title="T&T"
    )
    page = read(report)
    assert {p.name for p in report.path.parent.iterdir()} == {"page.html", "page.json"}  # nothing is left aside
    told = " ".join(report.data["headline"])
    assert "RSD reaches 82.5 ± 6.4 % top-1 (2 runs" in told
    assert "+2.0 points over training from scratch" in told and "paired by seed" in told
    # four times the pixels are nearly four times the products; the classifier stays
    assert re.search(r"3\.\d× fewer FLOPs \(counted\)|4\.0× fewer FLOPs \(counted\)", told), told
    assert "The teacher's top-1 is 90.0 %." in told
    assert "A note." in page and "T&amp;T" in page and "cats/1.png" in page
    for section in ("accuracy", "cost", "curves", "confusion", "features", "skipped", "settings", "environment"):
        assert f'<section id="{section}">' in page and f'href="#{section}"' in page
    assert re.search(r"<h3>Counted</h3>.*<h3>Measured</h3>", page, re.DOTALL)
    teacher, student = report.data["cost"]
    assert teacher["name"] == "test_resnet (teacher)"
    # on a busy machine the second batch may be over the time limit; then it is said so
    assert [row["batch_size"] for row in student["measured"]] in ([1, 2], [1])
    assert len(student["measured"]) == 2 or any("batch 2" in remark for remark in report.data["remarks"])
    assert student["counted"]["flops"] == 2 * student["counted"]["macs"]
    assert student["measured"][0]["speedup"] is not None
    assert report.data["environment"]["torch threads"]
    assert len(re.findall(r'<svg role="img" aria-label="[^"]+', page)) == page.count("<svg ") >= 6


def test_names_are_escaped_everywhere(tmp_path) -> None:
    bad = "<b>&\"'</b><script>alert(1)</script>"
    one = record(bad, classes=(bad, "b"), config={bad: bad}, skipped={bad: bad})
    page = read(build_report([one], [ModelRecord(bad, net(), 32, "student")], tmp_path / "p.html", title=bad,
                             notes=[bad], measure_speed=False))  # fmt: skip
    assert "<b>" not in page and "<script" not in page
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize(
    "odd",
    [
        record(seed=None),
        record(top1=None, confusion=None, embedding=None, history=[], classes=[], config={}),
        record(confusion=None),
        record(embedding={"features": np.zeros((2, 5)), "labels": np.zeros(2), "predictions": np.zeros(2)}),
        record(embedding={"features": np.full((24, 5), np.nan), "labels": np.arange(24), "predictions": np.arange(24)}),
    ],
    ids=["no seed", "nothing", "no confusion", "two points", "nan features"],
)
def test_a_single_odd_run_without_models(odd, tmp_path) -> None:
    report = build_report([odd], [], tmp_path / "p.html")
    page = read(report)
    assert "<h2>Cost and speed</h2>" not in page
    assert "n = 1 has no interval" in page
    assert "one run: differences may be chance" in page


def test_two_hundred_classes(tmp_path) -> None:
    page = read(build_report([record(classes=[f"class {i}" for i in range(200)])], [], tmp_path / "p.html"))
    assert "200 classes" in page


def test_nan_becomes_null(tmp_path) -> None:
    report = build_report([record(top1=math.nan), record("KD", 0, 0.5)], [], tmp_path / "p.html")
    read(report)
    assert report.data["runs"][0]["metrics"]["top1"] is None
    assert "top1" not in report.data["accuracy"][0]["metrics"]


def test_a_model_that_cannot_be_counted_is_said_so(tmp_path) -> None:
    model = ModelRecord("broken", nn.Linear(3, 4), 8, "student")
    report = build_report([record()], [model], tmp_path / "p.html", measure_speed=False)
    assert any("FLOPs of broken could not be counted" in remark for remark in report.data["remarks"])
    assert report.data["cost"][0]["counted"]["macs"] is None
    read(report)


def test_a_scratch_run_on_other_data_is_no_baseline(tmp_path) -> None:
    records = [record(), record("from scratch", config={"data": "digits", "labels_per_class": 3})]
    report = build_report(records, [], tmp_path / "p.html")
    assert all(row["to_scratch"] is None for row in report.data["accuracy"])


def test_the_headline_does_not_flatter(tmp_path) -> None:
    records = [record("KD", s, 0.7) for s in range(2)] + [record("from scratch", s, 0.8) for s in range(2)]
    told = build_report(records, [], tmp_path / "p.html").data["headline"]
    assert told[0].startswith("Best student: from scratch reaches 80.0 ± 0.0 %")
    assert told[1].startswith("No distilled student is above it: the best, KD, reaches 70.0")
    assert "−10.0 ± 0.0 points against training from scratch" in told[1]


def test_an_old_report_survives_a_failed_one(tmp_path, monkeypatch) -> None:
    path = build_report([record(top1=0.1)], [], tmp_path / "p").path
    assert path.name == "p.html"
    before = path.read_text()

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build_report([record(top1=0.9)], [], path)
    assert path.read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"p.html", "p.json"}


def test_bad_arguments_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one run record"):
        build_report([], [], tmp_path / "p.html")
    with pytest.raises(ValueError, match=r"image_size of vit must be a whole number ≥ 1, got 0"):
        build_report([record()], [ModelRecord("vit", net(), 0, "student")], tmp_path / "p.html")
    with pytest.raises(ValueError, match="batch_sizes"):
        build_report([record()], [], tmp_path / "p.html", batch_sizes=(0,))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write the report into .*file"):
        build_report([record()], [], tmp_path / "file" / "p.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        build_report([record()], [], tmp_path / "folder.html")


def test_importing_the_room_is_cheap() -> None:
    code = (
        "import sys, xdfast.reporting; "
        "print([m for m in ('matplotlib', 'sklearn', 'fvcore', 'jinja2', 'timm', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
