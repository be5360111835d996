"""Analysis in a report: the student's start to the bit, CKA, saliency and robustness of real runs, measured once."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("captum", reason="captum is not installed: pip install xdfast[analysis]")
pytest.importorskip("imagecorruptions", reason="imagecorruptions is not installed: pip install xdfast[analysis]")

import xdfast
from xdfast.models import weights_hash
from xdfast.models.stages import FEATURES
from xdfast.pipeline import analysis_cka, analysis_robustness
from xdfast.pipeline.analysis import parts_of
from xdfast.pipeline.analysis_cka import initial_student
from xdfast.pipeline.analysis_pictures import _one_of_each
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.distill import prepare

SMALL = {
    "data": "sklearn:digits", "labels_per_class": 4, "student_size": 32, "epochs": 1, "batch_size": 20, "augment": "none",
    "optimizer": "adamw", "lr": 1e-3, "workers": 0, "progress": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread) -> dict:
    out = tmp_path_factory.mktemp("analysis")
    teacher = xdfast.finetune("test_vit", out=str(out / "teacher"), **SMALL)
    pair = {"teacher": teacher, "student": "test_resnet", **SMALL}
    distilled = xdfast.distill(loss="kd", seed=3, out=str(out / "kd"), **pair)
    return {
        "unlabelled": xdfast.distill(loss="mse", ce_weight=0.0, monitor=0, out=str(out / "mse"), **pair),
        "distilled": distilled,
        "tuned": xdfast.finetune(distilled, out=str(out / "tuned"), **{**SMALL, "seed": 8}),
        "scratch": xdfast.finetune("test_resnet", out=str(out / "scratch"), **SMALL),
    }


def test_the_start_of_a_run_is_made_again_to_the_bit(runs) -> None:
    run = runs["distilled"]
    config = DistillConfig.from_dict(run.config)
    there = prepare(config, teacher=None, student=None, data=None, val_data=None).task.student
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    again = initial_student(run)
    assert torch.equal(torch.rand(3), drawn)  # the caller's generator is left alone
    assert weights_hash(again) == weights_hash(there) != weights_hash(run.student)
    assert weights_hash(initial_student(runs["tuned"])) == weights_hash(again)  # of the first of its stages
    assert weights_hash(initial_student(runs["unlabelled"])) != weights_hash(again)  # another seed


@pytest.mark.slow
def test_everything_on_one_page_and_measured_once(runs, tmp_path, monkeypatch) -> None:
    asked = {
        "out": tmp_path / "r.html", "measure_speed": False, "analysis": "all", "analysis_images": 8, "progress": False,
    }  # fmt: skip
    listed = [runs["unlabelled"], runs["tuned"], runs["scratch"]]
    data = xdfast.report(listed, **asked).data["analysis"]
    assert data["parts"] == ["cka", "tsne", "saliency", "robustness"]
    assert len(data["cka"]) == 3  # the one from scratch beside the only teacher of the page
    for cka in data["cka"]:
        assert cka["rows"][0] == "act1" and cka["columns"] == [*(f"blocks.{i}" for i in range(6)), FEATURES]
        table = np.array(cka["after"], dtype=float)
        assert table.shape == (len(cka["rows"]), 7) and np.isfinite(table).all() and cka["images"] == 8
        assert np.shape(cka["before"]) == table.shape and not np.allclose(np.array(cka["before"], dtype=float), table)
    # nothing trained the classifier of the first: it is explained by its features, and has no accuracy
    names = [row["label"] for row in data["robustness"]]
    assert len(names) == 3 and names[0].endswith("(teacher)") and names[2] == "from scratch"
    for row in data["robustness"]:
        assert len(row["severities"]) == 5 and len(row["corruptions"]) == 15 and 0 <= row["corrupted"]["mean"] <= 1
        mean = np.mean([value["mean"] for value in row["severities"]])
        assert (
            row["corrupted"]["mean"] == pytest.approx(mean) == pytest.approx(np.mean(list(row["corruptions"].values())))
        )
    looks = data["saliency"]
    assert len(looks) == 4 and len(data["truths"]) == 6 and len(set(data["truths"])) == 6
    assert looks[0]["method"].startswith("Grad-CAM at blocks.5") and looks[1]["said"] == [None] * 6
    assert "sets the picture's features apart" in looks[1]["method"] and looks[2]["right"].count(None) == 0

    def measured_again(*_, **__):
        raise AssertionError("measured a second time")

    monkeypatch.setattr(analysis_cka, "_measure", measured_again)
    monkeypatch.setattr(analysis_robustness, "_right", measured_again)
    assert xdfast.report(listed, **asked).data["analysis"] == data
    with pytest.raises(AssertionError, match="a second time"):  # other images are other figures
        xdfast.report(listed, **{**asked, "analysis": "robustness", "analysis_images": 6})
    text = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(text["analysis"]["measurements"]) == 3 + 3  # three maps; three models with a classifier


def test_a_start_that_is_gone_is_told(runs) -> None:
    run = runs["distilled"]
    gone = type(run)(run.kind, run.path, {**run.config, "student": "object:my.Net"}, run.metrics)
    with pytest.raises(ValueError, match=r"Python object \(my.Net\)"):
        initial_student(gone)


def test_pictures_of_different_classes() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert labels[_one_of_each(labels, 3)].tolist() == [0, 1, 2]
    assert sorted(labels[_one_of_each(labels, 5)].tolist()) == [0, 0, 1, 1, 2]
    assert labels[_one_of_each(np.arange(6), 2)].tolist() == [0, 2]  # the first class and the last
    assert len(_one_of_each(labels[:2], 6)) == 2


def test_bad_input(runs, monkeypatch) -> None:
    assert parts_of(()) == parts_of(False) == () and parts_of(True) == parts_of(["all"]) == parts_of("all")
    assert parts_of(["saliency", "cka"]) == ("cka", "saliency")
    with pytest.raises(ValueError, match="unknown analysis 'robust'. Did you mean 'robustness'"):
        xdfast.report(runs["scratch"], analysis="robust")
    with pytest.raises(ValueError, match="analysis_images must be ≥ 4, got 2"):
        xdfast.report(runs["scratch"], analysis="cka", analysis_images=2)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # as if it were not installed
    with pytest.raises(
        ImportError, match=r'corruptions of images and is not installed: pip install "xdfast\[analysis\]"'
    ):
        xdfast.report(runs["scratch"], analysis="robustness")
