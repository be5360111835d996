"""Many simulators at once, from scripts as people write them, and when workers fail, die, hang or are orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from sim_process import needs_renderer, run_script

from xdfast.robot.sim.processes import WorkerError
from xdfast.robot.sim.vector import vector_env
from xdfast.robot.video import read_video

_IDLE = np.zeros((2, 8, 4), np.float32)


@pytest.fixture
def two():
    with vector_env("drawer-open", 2, image_size=24, max_steps=20, timeout=60) as vector:
        yield vector


@needs_renderer
def test_episodes_filmed_masked_resets_and_the_end(two, tmp_path: Path):
    observation, info = two.reset(seed=[3, 4], options={"record": [tmp_path / "a.mp4", None]})
    assert observation["images"].shape == (2, 1, 1, 24, 24, 3) and observation["images"].dtype == np.uint8
    assert observation["state"].shape == (2, 1, 9) and observation["state"].dtype == np.float32
    assert "mujoco" not in sys.modules
    same, _ = two.reset(seed=[4, 4], options={"record": [tmp_path / "a.mp4", None]})
    assert (same["images"][0] == observation["images"][1]).all() and (same["state"][0] == same["state"][1]).all()
    for _ in range(3):
        _, _, terminated, truncated, info = two.step(_IDLE)
    assert truncated.all() and not terminated.any() and info["steps"].tolist() == [20, 20]
    assert len(read_video(tmp_path / "a.mp4")[0]) == 21 and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    two.reset(seed=7, options={"reset_mask": np.array([True, False])})  # only the first starts again
    _, _, _, truncated, info = two.step(_IDLE)
    assert info["steps"].tolist() == [8, 20] and info["executed"].tolist() == [8, 0]
    assert truncated.tolist() == [False, True]


@needs_renderer
def test_bad_actions_are_refused_and_the_workers_live_on(two):
    two.reset(seed=0)
    bad = _IDLE.copy()
    bad[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"metaworld/drawer-open-v3 contain nan at index \(1, 2, 3\)"):
        two.step(bad)
    with pytest.raises(ValueError, match=r"\[2, 8, 4\].*got float32 \[2, 8, 5\]"):
        two.step(np.zeros((2, 8, 5), np.float32))
    with pytest.raises(ValueError, match="list of 2 paths"):
        two.reset(options={"record": "one.mp4"})
    assert two.step(_IDLE)[4]["executed"].tolist() == [8, 8]


@needs_renderer
def test_a_killed_worker_is_named_at_once(two):
    two.reset(seed=0)
    began = time.monotonic()
    os.kill(two.processes[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"metaworld/drawer-open-v3: worker 1 of 2 was killed by SIGKILL"):
        two.step(_IDLE)
    assert time.monotonic() - began < 15
    assert two.closed and not any(p.is_alive() for p in two.processes)


@needs_renderer
def test_a_hanging_worker_ends_in_an_error():
    vector = vector_env("drawer-open", 2, image_size=24, timeout=20)
    vector.reset(seed=0)
    vector._timeout = 1.0
    os.kill(vector.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"worker 0 did not finish step in 1 s"):
        vector.step(_IDLE)
    assert not any(p.is_alive() for p in vector.processes)


@needs_renderer
def test_an_exception_in_a_worker_comes_back_with_its_place(two):
    with pytest.raises(WorkerError, match=r"drawer-open-v3: worker 1: .*[\s\S]*Traceback"):
        two.reset(seed=0, options={"record": [None, "/proc/nowhere/film.mp4"]})
        for _ in range(3):
            two.step(_IDLE)


def test_bad_arguments_start_nothing():
    with pytest.raises(ValueError, match="Did you mean 'drawer-open'"):
        vector_env("draw-open", 2)
    with pytest.raises(ValueError, match="count=0"):
        vector_env("drawer-open", 0)
    with pytest.raises(ValueError, match="timeout=0"):
        vector_env("drawer-open", 1, timeout=0)


_UNGUARDED = """
import torch
import diffusers
import sys
from xdfast.robot.sim.vector import vector_env

print("SCRIPT RUNS")
vector = vector_env("drawer-open", 2, image_size=24)
observation, _ = vector.reset(seed=0)
for _ in range(2):
    observation, *_ = vector.step(vector.action_space.sample())
print("PIDS", *[p.pid for p in vector.processes], flush=True)
if len(sys.argv) > 1:
    while True:
        vector.step(vector.action_space.sample())
import triton
x = torch.from_numpy(observation["images"]).float().mean()
print("MEAN", float(x))
vector.close()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "unguarded.py"
    file.write_text(_UNGUARDED)
    return file


def _wait_until_gone(pids: list[int], seconds: float = 15) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(psutil.pid_exists(p) for p in pids):
        time.sleep(0.1)
    return [p for p in pids if psutil.pid_exists(p)]


@needs_renderer
def test_an_unguarded_script_that_imports_torch_and_diffusers(script: Path):
    pytest.importorskip("diffusers")
    run = run_script(script)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("SCRIPT RUNS") == 1 and "MEAN" in run.stdout
    assert "Error" not in run.stderr, run.stderr


@needs_renderer
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_workers_end_with_the_script(script: Path, how: signal.Signals):
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and that is inherited.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script.write_text(
        heard + _UNGUARDED.replace("import torch\nimport diffusers\n", "", 1)
    )  # they take seconds to import
    command = [sys.executable, str(script), "forever"]
    # A session of its own: Ctrl-C goes to the script and its workers, not to the tests.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = ""
        while not line.startswith("PIDS"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        pids = [int(p) for p in line.split()[1:]]
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.kill()
        assert _wait_until_gone(pids) == []
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors, (
            errors
        )  # the script's own, none of a worker


def test_no_renderer_is_said_before_a_process_starts(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with pytest.raises(RuntimeError, match="turns rendering off: unset MUJOCO_GL"):
        vector_env("drawer-open", 1)
