"""For tests of simulated tasks: whether anything renders here, and scripts run in a process of their own.

The test process holds torch and may hold Triton; MuJoCo's software OpenGL must not be loaded into it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium")

from xdfast.robot.sim.gl import NoRendererError, Renderer, renderer


def _renderer() -> tuple[Renderer | None, str]:
    try:
        return renderer(), ""
    except (NoRendererError, ImportError) as error:
        return None, str(error)


RENDERER, WHY_NOT = _renderer()
needs_renderer = pytest.mark.skipif(RENDERER is None, reason=f"nothing renders here: {WHY_NOT}")


def run_python(code: str, *arguments: str, timeout: float = 110, **environment: str) -> Any:
    """Runs ``code`` in a new interpreter that may render; what its last line of output says, as JSON.

    ``environment`` is added to this process's; a value of "" removes a variable.
    """
    variables = {**os.environ, **({"MUJOCO_GL": RENDERER.name} if RENDERER else {}), **environment}
    variables = {name: value for name, value in variables.items() if value}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables, capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout.strip().splitlines()[-1])


def run_script(file: Path, *arguments: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user would."""
    return subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True, timeout=timeout)


_DIGEST = """
import hashlib, json, sys
import numpy as np
from xdfast.robot.sim.make import make_task
from xdfast.robot.sim.names import task_spec


def play(task, seed, steps):
    digest = hashlib.sha256()
    task.reset(seed)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        for camera in task.spec.cameras[:2]:
            digest.update(task.frame(camera).tobytes())
        digest.update(task.state().tobytes())
        action = task.expert() if task.spec.has_expert else random.uniform(-1, 1, task.spec.action_dim)
        digest.update(repr(task.step(action)).encode())
    return digest.hexdigest()

before, names = int(sys.argv[1]), sys.argv[2:]
found = {}
for name in names:
    task = make_task(name, 24)
    for seed in range(before):  # other episodes first
        play(task, 100 + seed, 20 + seed)
    found[name] = play(task, 5, 6)
    task.close()
print(json.dumps(found))
"""


def digests(before: int, *tasks: str) -> dict[str, str]:
    """Task → a hash of six steps of the episode of seed 5 (frames of two cameras, state, results), after ``before`` others."""
    return run_python(_DIGEST, str(before), *tasks, timeout=800)
