"""Checks of training in two processes, run by test_pipeline_scale.py, which puts the runs of one process into the folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.distributed.fsdp import FSDPModule

import xdfast
from xdfast import distributed
from xdfast.pipeline.config import FinetuneConfig
from xdfast.pipeline.parallel import Parallel
from xdfast.pipeline.task import SupervisedTask

FOLDER = Path(sys.argv[3]) if len(sys.argv) > 3 else Path()


class Digits:
    """So many digits as a torch dataset; ``killed_at``: the read within training at which this process is asked to stop."""

    def __init__(self, count: int, start: int = 0, killed_at: int | None = None) -> None:
        digits = load_digits()
        self.targets = digits.target[start : start + count].tolist()
        self.classes = [str(i) for i in range(10)]
        self._images = (digits.images[start : start + count] * 16).clip(0, 255).astype("uint8")
        self._killed_at, self._reads = killed_at, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int):
        self._reads += callable(signal.getsignal(signal.SIGTERM))  # the training loop is there to hear of it
        if self._reads == self._killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.from_numpy(self._images[i]).expand(3, -1, -1), self.targets[i]


def run(out: Path, count: int, **settings) -> dict[str, torch.Tensor]:
    """Weights of a student without batch statistics, after two epochs of ``count`` images."""
    killed_at = settings.pop("killed_at", None)
    finished = xdfast.distill(
        **{
            "teacher": "test_vit", "teacher_pretrained": False, "teacher_size": 32, "student": "test_resnet",
            "student_options": {"norm_layer": "groupnorm1"}, "student_size": 32, "data": Digits(count, 0, killed_at),
            "val_data": Digits(60, 200), "loss": "mse", "aad_expansion": 0, "tail": "exact", "augment": "small",
            "epochs": 2, "optimizer": "momentum", "lr": 0.05, "workers": 0, "progress": False, "device": "cpu", "out": str(out),
        }
        | settings
    )  # fmt: skip
    return load_file(finished.path / "student" / "model.safetensors")


#: Runs that one process makes too: batch_size is that of one process.
RUNS = {
    # 51 = 3 · 16 + 3 rows: the second process has none in the last step
    "idle": {"count": 51, "batch_size": 16, "accumulate": 3, "clip_grad": 0.5, "ema": 0.8},
    # 53 = 8 · 6 + 5 rows: 3 and 2 in the last step
    "uneven": {"count": 53, "batch_size": 6},
    # 49 = 3 · 16 + 1 rows: 17 in the last step, 9 and 8
    "joined": {"count": 49, "batch_size": 16, "optimizer": "adamw", "lr": 1e-3},
}


def shared(name: str, **settings) -> dict[str, torch.Tensor]:
    mine = RUNS[name] | settings
    return run(
        FOLDER / "-".join([name, *map(str, settings.values())]), **mine | {"batch_size": mine["batch_size"] // 2}
    )


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def of_one(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"one-{name}" / "student" / "model.safetensors")


def check_a_rank_without_rows():
    assert_same(shared("idle"), of_one("idle"), 1e-5)


def check_uneven_rows():
    assert_same(shared("uneven"), of_one("uneven"), 1e-5)


def check_a_joined_row():
    assert_same(shared("joined"), of_one("joined"), 1e-5)


def check_fsdp_with_accumulation_clipping_and_average():
    assert_same(shared("idle", parallel="fsdp"), of_one("idle"), 1e-5)


def check_fsdp_with_adamw():
    assert_same(shared("joined", parallel="fsdp"), of_one("joined"), 1e-5)


def check_the_resume_file_is_the_same():
    whole, sharded = (torch.load(FOLDER / name / "resume.pt", weights_only=True) for name in ("joined", "joined-fsdp"))
    assert whole.keys() == sharded.keys() and whole["identity"] == sharded["identity"]
    assert_same(sharded["task"], whole["task"], 1e-5)
    assert sharded["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]  # fused AdamW in both
    assert sharded["optimizer"]["state"].keys() == whole["optimizer"]["state"].keys()
    for index, state in whole["optimizer"]["state"].items():
        assert_same(sharded["optimizer"]["state"][index], state, 1e-4)


def check_stopped_within_an_epoch_and_continued_in_another_layout():
    # 13 steps an epoch; the processes agree on stopping every tenth step
    settings = {"batch_size": 2, "optimizer": "adamw", "lr": 1e-3, "ema": 0.8, "checkpoint_seconds": 1e6}
    expected = run(FOLDER / "unbroken", 51, **settings)
    for first, second in (("ddp", "fsdp"), ("fsdp", "ddp"), ("ddp", "ddp")):
        out = FOLDER / f"{first}-{second}"
        try:
            run(out, 51, **settings, parallel=first, killed_at=5 if distributed.rank() == 1 else None)
        except SystemExit:
            stopped = torch.load(out / "resume.pt", weights_only=True)["state"]
        assert (stopped["epoch"], stopped["batch"]) == (0, 10)
        actual = run(out, 51, **settings, parallel=second)
        assert_same(actual, expected, 0.0 if first == second else 1e-5)


def check_batch_statistics_with_a_rank_without_rows():
    for parallel in ("ddp", "fsdp"):
        out = FOLDER / f"norm-{parallel}"
        settings = {"student_options": {}, "loss": "rsd", "aad_expansion": 2, "ema": 0.5, "parallel": parallel}
        weights = run(out, 51, batch_size=8, **settings)
        assert all(torch.isfinite(value).all() for value in weights.values())
        # 3 steps of 8 rows on each rank and one of 3 on the first, in each of two epochs: rank 0 counted 8 batches
        tracked = torch.load(out / "resume.pt", weights_only=True)["task"]["student.net.bn1.num_batches_tracked"]
        assert int(tracked) == 8
    assert_same(weights, load_file(FOLDER / "norm-ddp" / "student" / "model.safetensors"), 1e-4)


def check_sharding_a_transformer():
    settings = {"student": "test_vit", "student_options": {}, "batch_size": 8, "ce_weight": 0.0}
    assert_same(run(FOLDER / "vit-fsdp", 20, **settings, parallel="fsdp"), run(FOLDER / "vit", 20, **settings), 1e-5)


def check_finetuning_with_a_rank_without_rows():
    settings = {"data": Digits(19), "val_data": Digits(60, 200), "student_size": 32, "augment": "none", "epochs": 1}
    settings |= {"tail": "exact", "batch_size": 8, "workers": 0, "progress": False, "device": "cpu", "lr": 0.05}
    weights = []
    for parallel in ("ddp", "fsdp"):
        run = xdfast.finetune(
            "test_resnet", freeze="encoder", parallel=parallel, out=str(FOLDER / f"ft-{parallel}"), **settings
        )
        assert run.metrics["steps"] == 2
        weights.append(load_file(run.path / "student" / "model.safetensors"))
    assert_same(weights[1], weights[0], 1e-5)


def check_an_exact_epoch_fills_the_teacher_cache():
    settings = {"batch_size": 8, "augment": "none", "cache": str(FOLDER / "outputs"), "cache_views": 1}
    filling = run(FOLDER / "filling", 51, **settings)
    assert_same(run(FOLDER / "reading", 51, **settings), filling, 0.0)


def check_each_rank_holds_a_part():
    net = xdfast.create_model("test_vit", num_classes=10, pretrained=False)
    total, names = sum(p.numel() for p in net.parameters()), list(net.state_dict())
    config = FinetuneConfig(model="m", data="d", out="o", parallel="fsdp", ema=0.5)
    model = Parallel(SupervisedTask(net), config, torch.device("cpu"))
    for module in (model.task, model.ema.module):
        held = sum(p.to_local().numel() for p in module.parameters())
        assert held < 0.6 * total
    blocks = [m for m in net.modules() if isinstance(m, FSDPModule)]
    assert len(blocks) == 1 + len(net.net.blocks) and list(net.state_dict()) == names
    assert model.first_not_finite() is None
    if distributed.rank() == 1:
        net.classifier.weight.to_local().data.fill_(float("nan"))
    assert model.first_not_finite() == ("student.net.head.weight" if distributed.rank() else "a part on another rank")
