"""torchrun with two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.ddp

FLAGS = [
    "--data", "sklearn:digits", "--labels-per-class", "8", "--student-size", "32", "--epochs", "2", "--augment", "none",
    "--optimizer", "momentum", "--lr", "0.01", "--workers", "0", "--no-progress", "--device", "cpu",
]  # fmt: skip


def start(processes: int, *arguments: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [*torchrun, "-m", "xdfast", *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def xdfast_cli(processes: int, *arguments: str) -> None:
    process = start(processes, *arguments)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student" / "model.safetensors")


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path) -> None:
    # test_vit has no batch statistics: the mean of two ranks' gradients is the gradient of the whole batch
    xdfast_cli(2, "finetune", "--model", "test_vit", *FLAGS, "--batch-size", "10", "--out", str(tmp_path / "two"))
    xdfast_cli(1, "finetune", "--model", "test_vit", *FLAGS, "--batch-size", "20", "--out", str(tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_distillation_runs_on_two_processes_and_averages_the_projector(tmp_path) -> None:
    teacher = ["--teacher", "test_vit", "--no-teacher-pretrained", "--teacher-size", "32"]
    xdfast_cli(
        2, "distill", *teacher, "--student", "test_resnet", *FLAGS, "--batch-size", "10", "--out", str(tmp_path / "run")
    )
    saved = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert saved["identity"]["world_size"] == 2
    assert saved["state"]["epoch"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks_and_the_same_command_continues(tmp_path) -> None:
    """As a cluster's scheduler ends a job: torchrun passes the signal on, the ranks agree on a step, save and leave."""
    flags = [
        "finetune", "--model", "test_vit", *FLAGS, "--epochs", "400", "--warmup-epochs", "0", "--batch-size", "10",
        "--eval-every", "1000", "--checkpoint-seconds", "1e6", "--log-every", "1",
    ]  # fmt: skip
    out = tmp_path / "run"
    process = start(2, *flags, "--out", str(out))
    end = time.monotonic() + 100
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=200)
    # torchrun itself says that it was ended by a signal; both ranks left by themselves, within its patience of 30 s.
    assert process.returncode == 1 and told.count("the state is saved in") >= 1 and "SIGKILL" not in told, told
    stopped = torch.load(out / "resume.pt", weights_only=True)["state"]["step"]
    assert stopped > 0 and (
        stopped % 10 == 0 or stopped % 4 == 0
    )  # ranks ask each other every ten steps and after an epoch
    process = start(2, *flags, "--out", str(out))
    end = time.monotonic() + 100
    while f"step {stopped}" not in (line := process.stdout.readline()) and time.monotonic() < end:
        assert line, "it ended without saying where it continues"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    assert torch.load(out / "resume.pt", weights_only=True)["state"]["step"] >= stopped


@pytest.mark.slow
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
