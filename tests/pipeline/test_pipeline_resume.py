"""Killed at any moment, the same command continues and ends with the weights of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = {
    "data": "sklearn:digits",
    "labels_per_class": 12,
    "student": "test_resnet",
    "student_size": 32,
    "student_options": {"drop_rate": 0.2},  # dropout: the random numbers must continue too
    "epochs": 3,
    "batch_size": 16,
    "augment": "small",
    "mixup": 0.2,
    "optimizer": "adamw",
    "lr": 2e-3,
    "ema": 0.95,
    "warmup_epochs": 1,
    "log_every": 3,
    "checkpoint_seconds": 0.0,  # a resume file after every step
    "workers": 0,
    "progress": False,
}
RUN = """
import json, sys, xdfast
settings = json.loads(sys.argv[1])
xdfast.distill(**settings)
"""


def start(settings: dict) -> subprocess.Popen:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(settings)], env=env, stderr=subprocess.PIPE, text=True
    )


def steps_done(out: Path) -> int:
    try:
        return torch.load(out / "resume.pt", weights_only=True)["state"]["step"]
    except (OSError, RuntimeError, EOFError, KeyError):
        return 0


def finish(settings: dict) -> None:
    process = start(settings)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in lines]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    import xdfast

    out = tmp_path_factory.mktemp("resume")
    teacher = xdfast.finetune(
        "test_vit", data="sklearn:digits", labels_per_class=8, student_size=32, epochs=1, batch_size=40, augment="none",
        progress=False, workers=0, out=str(out / "teacher"),
    )  # fmt: skip
    return {**SETTINGS, "teacher": str(teacher.path), "root": str(out)}


@pytest.fixture(scope="module")
def unbroken(settings) -> Path:
    out = Path(settings["root"]) / "unbroken"
    finish({k: v for k, v in settings.items() if k != "root"} | {"out": str(out)})
    return out


@pytest.mark.parametrize(
    "signal_number",
    [pytest.param(signal.SIGKILL, id="kill-9"), pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.slow)],
)
def test_killed_and_continued_equals_unbroken(settings, unbroken, signal_number) -> None:
    out = Path(settings["root"]) / f"broken-{signal_number}"
    mine = {k: v for k, v in settings.items() if k != "root"} | {"out": str(out)}
    kills, told = 0, ""
    for target in (2, 9, 16):  # within the first, second and third epoch (7 steps each)
        process = start(mine)
        while process.poll() is None and steps_done(out) < target:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal_number)
            kills += 1
        _, errors = process.communicate(timeout=60)
        # SIGTERM within the loop ends with 0 once the state is saved; outside of it (imports, the last files) it just ends.
        assert process.returncode in (0, -signal_number), errors
        told += errors
    assert kills >= 2
    # A kill -9 leaves no time for it; at least one SIGTERM of three meets the loop.
    assert ("the state is saved" in told) == (signal_number == signal.SIGTERM)
    finish(mine)
    a, b = (load_file(path / "student" / "model.safetensors") for path in (unbroken, out))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert rows(out) == rows(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["validating", "filling"])
def test_sigterm_outside_of_steps_does_not_wait_for_their_end(settings, unbroken, tmp_path, when) -> None:
    """Validation of a large set takes minutes; a machine that is taken away leaves seconds."""
    out = tmp_path / "run"
    slow = {"validating": "pipeline.train_run.accuracy", "filling": "pipeline.task.DistillTask.begin_epoch"}[when]
    run = f"""
import json, sys, time, xdfast, xdfast.pipeline.train_run
def slow(*given):
    print("there", flush=True)
    time.sleep(600)
owner, name = "xdfast.{slow}".rsplit(".", 1)
import pkgutil
setattr(pkgutil.resolve_name(owner), name, slow)
xdfast.distill(**json.loads(sys.argv[1]))
"""
    mine = {k: v for k, v in settings.items() if k != "root"} | {"out": str(out), "checkpoint_seconds": 1e6}
    process = subprocess.Popen(
        [sys.executable, "-c", run, json.dumps(mine)], env={**os.environ, "PYTHONSAFEPATH": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "there\n", process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0 and "the state is saved" in told, told
    state = torch.load(out / "resume.pt", weights_only=True)["state"]
    assert (state["epoch"], state["batch"]) == (0, 7 if when == "validating" else 0)  # validation is still to come
    finish({**mine, "checkpoint_seconds": 0.0})
    a, b = (load_file(path / "student" / "model.safetensors") for path in (unbroken, out))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert rows(out) == rows(unbroken)


def test_other_data_or_another_teacher_is_refused(settings, unbroken, tmp_path) -> None:
    import shutil

    import xdfast

    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (out / "summary.json").unlink()
    saved = torch.load(out / "resume.pt", weights_only=True)
    saved["identity"]["teacher"] = "of another teacher"
    torch.save(saved, out / "resume.pt")
    mine = {k: v for k, v in settings.items() if k != "root"} | {"out": str(out)}
    with pytest.raises(RuntimeError, match="belongs to another run .teacher: 'of another teacher' then"):
        xdfast.distill(**mine)


def test_a_damaged_resume_file_is_named(settings, unbroken, tmp_path) -> None:
    import shutil

    import xdfast

    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    (out / "summary.json").unlink()
    (out / "resume.pt").write_bytes((out / "resume.pt").read_bytes()[:1000])
    mine = {k: v for k, v in settings.items() if k != "root"} | {"out": str(out)}
    with pytest.raises(RuntimeError, match=r"resume\.pt"):
        xdfast.distill(**mine)
