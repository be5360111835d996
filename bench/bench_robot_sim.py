"""Simulated tasks: physics, drawing, resets and collected demonstrations a second; see xdfast.bench.robot_sim.

make bench-robot
"""

from __future__ import annotations

import importlib.metadata
import os
import statistics

import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("av")

from xdfast.bench.harness import machine
from xdfast.bench.robot_sim import MUST_REACH, TASKS, collect_once, measure
from xdfast.robot.sim.gl import NoRendererError, renderer

try:
    _RENDERER, _WHY = renderer(), ""
except (NoRendererError, ImportError) as error:
    _RENDERER, _WHY = None, str(error)
pytestmark = [pytest.mark.skipif(_RENDERER is None, reason=_WHY or "renders"), pytest.mark.timeout(900)]


def _about() -> dict:
    versions = {p: importlib.metadata.version(p) for p in ("mujoco", "metaworld", "gymnasium-robotics")}
    return {**machine(), "load_before": os.getloadavg()[0], "renderer": _RENDERER and _RENDERER.name, **versions}


@pytest.mark.parametrize("workers", [1, 2])
def bench_collect_drawer_open_96(benchmark, workers: int) -> None:
    rounds = [collect_once("drawer-open", 10, 96, workers) for _ in range(3)]
    middle = statistics.median(r["frames_per_cpu_s"] for r in rounds)
    benchmark.extra_info.update(machine=_about(), rounds=rounds, median_frames_per_cpu_s=middle, target=MUST_REACH)
    benchmark.pedantic(collect_once, args=("drawer-open", 5, 96, workers), rounds=1)


@pytest.mark.parametrize("task", TASKS)
def bench_task(benchmark, task: str) -> None:
    found = {str(size): measure(task, size) for size in (96, 224)}
    benchmark.extra_info.update(machine=_about(), by_size=found)
    benchmark.pedantic(measure, args=(task, 96), rounds=1)
