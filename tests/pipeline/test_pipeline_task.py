"""The loss with the labels, and the settings of the `stronger` recipe, in a run."""

from __future__ import annotations

import json

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

import xdfast
from xdfast.pipeline.task import SupervisedTask


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing) -> None:
    task = SupervisedTask(nn.Identity(), smoothing, "bce")
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    torch.testing.assert_close(
        task._label_loss(logits, labels), BinaryCrossEntropy(smoothing=smoothing)(logits, labels)
    )
    mixed = torch.rand(6, 5).softmax(1)
    torch.testing.assert_close(
        SupervisedTask(nn.Identity(), 0.0, "bce")._label_loss(logits, mixed),
        BinaryCrossEntropy(smoothing=0.0)(logits, mixed),
    )


def test_a_run_with_repeats_bce_and_a_crop(tmp_path) -> None:
    run = xdfast.finetune(
        "test_resnet", data="sklearn:digits", labels_per_class=12, student_size=32, epochs=4, batch_size=24, augment="small",
        label_loss="bce", label_smoothing=0.0, aug_repeats=3, crop_pct=0.9, optimizer="adamw", lr=3e-3, workers=0,
        progress=False, device="cpu", log_every=1, out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    trained = [row["loss_bce"] for row in rows if row["kind"] == "train"]
    assert trained[-1] < 0.7 * trained[0] and not any("loss_ce" in row for row in rows)
    found = xdfast.evaluate(run, knn=0, linear_probe=False, progress=False)
    assert found.metrics["top1"] == pytest.approx(run.metrics["top1"], abs=1e-6)  # at the run's crop
    whole = xdfast.evaluate(run, knn=0, linear_probe=False, progress=False, crop_pct=1.0, out=str(tmp_path / "whole"))
    assert whole.metrics["loss"] != found.metrics["loss"]
