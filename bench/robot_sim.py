"""Measures simulated tasks on one core: physics, drawing, resets, and demonstrations collected. In processes of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["MUST_REACH", "TASKS", "collect_once", "measure"]

#: Frames a second and core, simulation, expert and writing included, at 96 px.
MUST_REACH = {"collect": 60.0}

TASKS = ("metaworld/drawer-open-v3", "metaworld/pick-place-v3", "metaworld/assembly-v3", "adroit/door")

_MEASURE = """
import json, sys, time
import numpy as np
from xdfast.robot.sim.make import make_task

def per_second(call, seconds):
    call()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        count += 1
    return round(count / (time.perf_counter() - began), 1)

name, size = sys.argv[1], int(sys.argv[2])
began = time.perf_counter()
task = make_task(name, size)
start = time.perf_counter() - began
task.reset(0)
action = np.zeros(task.spec.action_dim)
camera = task.spec.cameras[0]
print(json.dumps({
    "start_s": round(start, 2),
    "resets_per_s": per_second(lambda: task.reset(0), 1),
    "steps_per_s": per_second(lambda: task.step(action), 1),
    "frames_per_s": per_second(lambda: task.frame(camera), 2),
}))
"""


def measure(task: str, size: int) -> dict[str, Any]:
    """Start, resets, steps and frames of one task in one process that renders."""
    from xdfast.robot.sim.processes import spawning

    with spawning():  # the environment of a worker
        run = subprocess.run(
            [sys.executable, "-c", _MEASURE, task, str(size)], capture_output=True, text=True, timeout=120
        )
    if run.returncode:
        raise RuntimeError(f"{task}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def collect_once(task: str, episodes: int, size: int, workers: int) -> dict[str, float]:
    """One collection: frames a second, by core and by CPU second; the start of the workers is in it."""
    from xdfast.robot.demos.collect import collect

    with tempfile.TemporaryDirectory() as folder:
        # One episode starts everything (files in the cache); what follows is timed.
        collect(task, 1, Path(folder) / "first", image_size=size, workers=1, progress=False)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = collect(task, episodes, Path(folder) / "demos", image_size=size, workers=workers, progress=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "frames": found.frames,
        "seconds": round(found.seconds, 2),
        "frames_per_s": round(found.frames / found.seconds, 1),
        "frames_per_cpu_s": round(found.frames / cpu, 1),  # what other processes on the machine disturb least
        "frames_per_s_and_core": round(found.frames / found.seconds / workers, 1),
    }
