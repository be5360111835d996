"""torchrun with two processes: a memory bank, statistics of the whole batch, projectors of every kind, two teachers."""

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
    "--teacher", "test_vit", "--teacher", "test_resnet", "--no-teacher-pretrained", "--teacher-size", "32",
    "--student", "test_resnet", "--student-size", "32", "--data", "sklearn:digits", "--labels-per-class", "4", "--epochs", "1",
    "--batch-size", "10", "--augment", "none", "--optimizer", "adamw", "--lr", "1e-3", "--workers", "0", "--no-progress",
    "--device", "cpu", "--loss", "crd+rsd:0.01+rkd:0.1+fitnet", "--statistics", "global", "--taps", "layer2",
    "1:blocks.1,2:layer2",
]  # fmt: skip


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xdfast"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_losses_that_talk(parallel, tmp_path: Path) -> None:
    run = torchrun("distill", *FLAGS, "--parallel", parallel, "--out", str(tmp_path / "run"))
    assert run.returncode == 0, run.stdout + run.stderr
    saved = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert saved["identity"]["world_size"] == 2
    for n in (1, 2):
        bank = saved["task"][f"losses.crd_t{n}.student_bank"]
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(40))  # rows of both ranks: each image was seen once
    projected = {name.partition(".")[0] for name in load_file(tmp_path / "run" / "projectors.safetensors")}
    assert projected == {f"{name}_t{n}" for name in ("crd", "rsd", "rsd_at_layer2", "fitnet_at_layer2") for n in (1, 2)}


@pytest.mark.slow
def test_exact_tails_are_refused_with_them(tmp_path: Path) -> None:
    run = torchrun("distill", *FLAGS, "--tail", "exact", "--out", str(tmp_path / "run"))
    assert run.returncode != 0
    assert "loss 'crd' as set here talks to all processes in every step" in run.stdout + run.stderr
