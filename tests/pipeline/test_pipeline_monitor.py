"""Distillation without labels: what is measured, and that nothing is called accuracy that is not."""

from __future__ import annotations

import pytest
import torch

import xdfast
from xdfast.data import open_source
from xdfast.pipeline.monitor import sample

SETTINGS = {
    "teacher": "test_vit",
    "teacher_pretrained": False,
    "teacher_size": 32,
    "student": "test_resnet",
    "student_size": 32,
    "data": "sklearn:digits",
    "labels_per_class": 20,
    "loss": "mse",
    "ce_weight": 0.0,
    "aad_expansion": 0.0,
    "epochs": 3,
    "batch_size": 20,
    "augment": "none",
    "optimizer": "adamw",
    "lr": 3e-3,
    "workers": 0,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    run = xdfast.finetune(
        "test_vit", data="sklearn:digits", student_size=32, epochs=8, batch_size=64, augment="none", optimizer="adamw",
        lr=3e-3, workers=0, progress=False, out=str(tmp_path_factory.mktemp("teacher") / "run"),
    )  # fmt: skip
    return str(run.path)


@pytest.mark.slow
def test_agreement_and_neighbours_improve_over_epochs(teacher, tmp_path) -> None:
    settings = {**SETTINGS, "teacher": teacher, "epochs": 10, "monitor": 300}
    run = xdfast.distill(**settings, out=str(tmp_path / "run"))
    rows = {row["epoch"]: row for row in run.history if row["kind"] == "val"}
    assert list(rows) == [-1, *range(10)] and all("top1" not in row for row in rows.values())
    for name in ("agreement", "knn"):
        assert rows[-1][name] < rows[4][name] - 0.02 < rows[9][name]
        assert run.metrics[name] == rows[9][name] <= 1
    evaluation = xdfast.evaluate(run)
    assert "top1" not in evaluation.metrics and {"knn", "cka", "linear_probe"} <= set(evaluation.metrics)
    assert (run.path / "projectors.safetensors").is_file()


def test_a_trained_classifier_is_validated_as_ever(tmp_path) -> None:
    run = xdfast.distill(**{**SETTINGS, "ce_weight": 1.0, "epochs": 1}, out=str(tmp_path / "run"))
    assert "top1" in run.metrics and "agreement" not in run.metrics


def test_monitoring_changes_no_weight_and_can_be_left_out(tmp_path) -> None:
    with_it = xdfast.distill(**SETTINGS, out=str(tmp_path / "with"))
    without = xdfast.distill(**{**SETTINGS, "monitor": 0}, out=str(tmp_path / "without"))
    assert "agreement" in with_it.metrics and not {"agreement", "top1"} & set(without.metrics)
    a, b = with_it.student.state_dict(), without.student.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_unlabelled_images_need_no_classes(tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    digits = open_source("sklearn:digits", val_fraction=None)
    for i in range(60):
        digits.load(i).save(folder / f"{i}.png")
    run = xdfast.distill(
        **{**SETTINGS, "data": f"unlabelled:{folder}", "labels_per_class": None}, out=str(tmp_path / "run")
    )
    assert "agreement" in run.metrics and "knn" not in run.metrics
    evaluation = xdfast.evaluate(run)
    assert "cka" in evaluation.metrics


def test_the_sample_is_the_same_in_every_run() -> None:
    source = open_source("sklearn:digits", val_fraction=None)
    some = sample(source, 100)
    assert len(some) == 100 and some.fingerprint() == sample(source, 100).fingerprint()
    assert len(set(some.labels.tolist())) == 10 and sample(source, 10_000) is source


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("mse+rds", "Did you mean 'rsd'"),
        ("mse+mse", "comes twice"),
        ("rsd:much", "must be a number ≥ 0, got 'much'"),
        ("rsd:-1", "must be a number ≥ 0, got '-1'"),
    ],
)
def test_losses_and_their_weights_are_checked(tmp_path, loss, message) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        xdfast.distill(**{**SETTINGS, "loss": loss}, out=str(tmp_path / "run"))


def test_each_loss_can_have_a_weight_of_its_own(tmp_path) -> None:
    one = xdfast.distill(**{**SETTINGS, "loss": "mse:0.5+rsd:0.001", "epochs": 1}, out=str(tmp_path / "one"))
    row = next(row for row in one.history if row["kind"] == "train")
    assert row["loss"] == pytest.approx(row["loss_mse"] + row["loss_rsd"], rel=1e-5)
    two = xdfast.distill(**{**SETTINGS, "loss": "mse+rsd:0.001", "epochs": 1, "lr": 1e-12}, out=str(tmp_path / "two"))
    three = xdfast.distill(
        **{**SETTINGS, "loss": "mse:2+rsd:0.001", "epochs": 1, "lr": 1e-12}, out=str(tmp_path / "three")
    )
    first, second = (next(r for r in run.history if r["kind"] == "train") for run in (two, three))
    assert second["loss_mse"] == pytest.approx(2 * first["loss_mse"], rel=1e-3)
    assert second["loss_rsd"] == pytest.approx(first["loss_rsd"], rel=1e-3)
