"""Simulators and demonstrations import no torch, and looking at them loads no simulator."""

from __future__ import annotations

import pkgutil

from sim_process import run_python

import xdfast.robot.demos
import xdfast.robot.sim

_IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
unwanted = ("torch", "triton", "diffusers", "mujoco", "metaworld", "gymnasium_robotics", "OpenGL")
print(json.dumps([name for name in unwanted if name in sys.modules]))
"""


def _modules(*packages) -> list[str]:
    return [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]


def test_no_module_of_the_render_processes_imports_torch_or_a_simulator():
    modules = [*_modules(xdfast.robot.sim, xdfast.robot.demos), "xdfast.robot.video", "xdfast.progress"]
    assert {"xdfast.robot.sim.vector", "xdfast.robot.sim.metaworld", "xdfast.robot.demos.collect"} <= set(modules)
    assert run_python(_IMPORT, *modules) == []
