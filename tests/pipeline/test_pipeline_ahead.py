"""Work one batch ahead: the same run, in another order on the device."""

from __future__ import annotations

import pytest
import torch

import xdfast
from xdfast.pipeline import loop
from xdfast.pipeline.ahead import Lane, ahead, lane_for

SETTINGS = {
    "teacher": "test_vit",
    "teacher_pretrained": False,
    "teacher_size": 32,
    "student": "test_resnet",
    "student_size": 32,
    "student_options": {"drop_rate": 0.3},
    "data": "sklearn:digits",
    "labels_per_class": 8,
    "loss": "mse",
    "augment": "small",
    "mixup": 0.3,
    "epochs": 2,
    "batch_size": 12,
    "accumulate": 2,
    "optimizer": "adamw",
    "lr": 1e-3,
    "workers": 0,
    "progress": False,
    "device": "cpu",
}


def test_results_come_in_order_one_ahead() -> None:
    log: list[str] = []

    def make(number, batch):
        log.append(f"make {number}")
        return batch

    for lane, expected in (
        (None, ["make 3", "use a", "make 4", "use b", "make 5", "use c"]),
        (Lane(), ["make 3", "make 4", "use a", "make 5", "use b", "use c"]),
    ):
        log.clear()
        for item in ahead("abc", make, lane, 3):  # type: ignore[arg-type]
            log.append(f"use {item}")
        assert log == expected
    assert list(ahead([], make, Lane(), 0)) == []


def test_a_run_that_works_ahead_ends_with_the_same_weights(tmp_path, monkeypatch) -> None:
    """Dropout, mixup and accumulation draw at random: where they are drawn must not matter."""
    plain = xdfast.distill(**SETTINGS, out=str(tmp_path / "plain"))
    monkeypatch.setattr(loop, "lane_for", lambda overlap, device: Lane())
    ahead_of = xdfast.distill(**SETTINGS, out=str(tmp_path / "ahead"))
    a, b = plain.student.state_dict(), ahead_of.student.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_there_is_a_lane_on_gpus_alone() -> None:
    assert lane_for(True, torch.device("cpu")) is None and lane_for(False, torch.device("cuda")) is None


@pytest.mark.gpu
def test_a_stream_of_its_own_changes_no_weight(tmp_path) -> None:
    runs = [
        xdfast.distill(**{**SETTINGS, "device": "cuda", "overlap": overlap}, out=str(tmp_path / str(overlap)))
        for overlap in (False, True)
    ]
    a, b = (run.student.state_dict() for run in runs)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
