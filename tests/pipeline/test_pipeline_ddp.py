"""torchrun with two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.ddp

FLAGS = [
    "--data", "sklearn:digits", "--labels-per-class", "8", "--student-size", "32", "--epochs", "2", "--augment", "none",
    "--optimizer", "momentum", "--lr", "0.01", "--workers", "0", "--no-progress", "--device", "cpu",
]  # fmt: skip


def xdfast_cli(processes: int, *arguments: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    code = ["-m", "xdfast"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([*torchrun, *code, *arguments], env=env, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path) -> None:
    # test_vit has no batch statistics: the mean of two ranks' gradients is the gradient of the whole batch
    xdfast_cli(2, "finetune", "--model", "test_vit", *FLAGS, "--batch-size", "10", "--out", str(tmp_path / "two"))
    xdfast_cli(1, "finetune", "--model", "test_vit", *FLAGS, "--batch-size", "20", "--out", str(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


def test_distillation_runs_on_two_processes_and_averages_the_projector(tmp_path) -> None:
    teacher = ["--teacher", "test_vit", "--no-teacher-pretrained", "--teacher-size", "32"]
    xdfast_cli(
        2, "distill", *teacher, "--student", "test_resnet", *FLAGS, "--batch-size", "10", "--out", str(tmp_path / "run")
    )
    saved = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert saved["identity"]["world_size"] == 2
    assert saved["state"]["epoch"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_policy_trains_on_two_processes(tmp_path) -> None:
    from policy_parts import write_demos

    from xdfast.robot import load_policy

    flags = [
        "--task", "my-robot", "--demos", str(write_demos(tmp_path / "demos")), "--model", "test_resnet", "--crop", "20",
        "--unet-widths", "16", "32", "--batch-size", "4", "--steps", "6", "--warmup-steps", "2", "--no-progress",
        "--device", "cpu", "--log-every", "1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    xdfast_cli(2, "finetune", *flags)
    saved = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert saved["identity"]["world_size"] == 2 and saved["state"]["step"] == 6
    assert load_policy(tmp_path / "run").spec.task == "my-robot"
