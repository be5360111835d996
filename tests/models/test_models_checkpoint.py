"""Checkpoints are whole or not there: kills, full disks and damaged files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xdfast.models import CheckpointError, atomic_write, load_resume, save_resume


def test_round_trip_of_tensors_and_plain_values(tmp_path) -> None:
    state = {"step": 3, "w": torch.arange(4.0), "nested": {"a": [1, 2.5, None, "x"]}}
    save_resume(tmp_path / "resume.pt", state)
    loaded = load_resume(tmp_path / "resume.pt")
    assert torch.equal(loaded.pop("w"), state.pop("w")) and loaded == state
    assert [p.name for p in tmp_path.iterdir()] == ["resume.pt"]


def test_an_exception_while_writing_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    atomic_write(path, lambda aside: aside.write_text("old"))

    def fail(aside: Path) -> None:
        aside.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, signal, sys, torch
from xdfast.models import CheckpointError, save_resume, save_student, create_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel then refuses the write, as it does on a full disk
student = create_model("test_resnet")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (lambda: save_resume(sys.argv[1], {"w": torch.zeros(100_000)}), lambda: save_student(student, sys.argv[2])):
    try:
        write()
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path) -> None:
    path = tmp_path / "resume.pt"
    save_resume(path, {"step": 1})
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(tmp_path / "student")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert f"cannot write {path}" in run.stdout and "the file that was there before is unharmed" in run.stdout
    assert any("student/model.safetensors" in line for line in lines)
    assert load_resume(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["resume.pt"]
    assert list((tmp_path / "student").iterdir()) == []


KEEP_SAVING = """
import itertools, sys, torch
from xdfast.models import save_resume
for step in itertools.count():
    save_resume(sys.argv[1], {"step": step, "w": torch.full((300_000,), float(step))})
"""


def test_kill_9_in_the_middle_of_saving_leaves_a_whole_file(tmp_path) -> None:
    path = tmp_path / "resume.pt"
    process = subprocess.Popen([sys.executable, "-c", KEEP_SAVING, str(path)])
    try:
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    state = load_resume(path)
    assert torch.equal(state["w"], torch.full((300_000,), float(state["step"])))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_file_is_named(tmp_path, content) -> None:
    (tmp_path / "resume.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resume.pt is damaged or not a resume file.*delete it to start"):
        load_resume(tmp_path / "resume.pt")


def test_other_content_and_missing_files(tmp_path) -> None:
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="it holds a Tensor"):
        load_resume(tmp_path / "tensor.pt")
    with pytest.raises(FileNotFoundError):
        load_resume(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_resume(tmp_path / "no" / "folder" / "resume.pt", {})


def test_a_truncated_checkpoint_is_found_out(tmp_path) -> None:
    path = tmp_path / "resume.pt"
    save_resume(path, {"w": torch.rand(10_000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_resume(path)
