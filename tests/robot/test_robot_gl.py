"""The choice of the renderer, with libraries made to be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim_process import RENDERER, needs_renderer, run_python

_ASK = """
import json, sys
from xdfast.robot.sim.gl import NoRendererError, renderer
try:
    print(json.dumps(list(renderer())))
except NoRendererError as error:
    print(json.dumps(str(error)))
assert "mujoco" not in sys.modules and "OpenGL" not in sys.modules
"""


@pytest.fixture
def no_osmesa(tmp_path: Path) -> dict[str, str]:
    """Environment in which libOSMesa is there and broken: the loader finds empty files before the true ones."""
    for name in ("libOSMesa.so", "libOSMesa.so.6", "libOSMesa.so.8"):
        (tmp_path / name).touch()
    return {"LD_LIBRARY_PATH": str(tmp_path)}


# The vendor-neutral libEGL looks here for drivers.
_NO_EGL = {"__EGL_VENDOR_LIBRARY_DIRS": "/nowhere"}


@needs_renderer
def test_something_is_chosen_with_a_reason():
    name, reason = run_python(_ASK, MUJOCO_GL="")
    assert name in ("egl", "osmesa") and reason


@needs_renderer
def test_mujoco_gl_is_respected():
    assert RENDERER is not None
    name, reason = run_python(_ASK, MUJOCO_GL=RENDERER.name)
    assert name == RENDERER.name and "is set" in reason


def test_no_renderer_says_what_to_install(no_osmesa):
    answer = run_python(_ASK, MUJOCO_GL="", **no_osmesa, **_NO_EGL)
    if isinstance(answer, list):
        assert answer[0] == "egl" and "EGL works with" in answer[1]  # a GPU's driver, found in another way
    else:
        assert "apt-get install libosmesa6" in answer and "make install-robot" in answer and "libOSMesa" in answer


def test_egl_asked_for_without_a_device():
    answer = run_python(_ASK, MUJOCO_GL="egl", **_NO_EGL)
    if isinstance(answer, str):
        assert "MUJOCO_GL=egl is set and does not render here" in answer and "unset MUJOCO_GL" in answer


def test_osmesa_asked_for_and_missing(no_osmesa):
    answer = run_python(_ASK, MUJOCO_GL="osmesa", **no_osmesa)
    assert "libOSMesa is missing or broken" in answer and "apt-get install libosmesa6" in answer


def test_nonsense_and_off():
    assert "MUJOCO_GL=vulkan is set and does not render" in run_python(_ASK, MUJOCO_GL="vulkan")
    assert "turns rendering off: unset MUJOCO_GL" in run_python(_ASK, MUJOCO_GL="disable")


def test_install_asks_apt_as_root_and_never_fails(tmp_path: Path, no_osmesa):
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text('#!/bin/sh\necho "apt-get was asked: $@"\nexit 1\n')
    apt.chmod(0o755)
    environment = {**os.environ, **no_osmesa, **_NO_EGL, "PATH": f"{apt.parent}:{os.environ['PATH']}"}
    environment.pop("MUJOCO_GL", None)
    command = [sys.executable, "-m", "xdfast.robot.sim.install"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    if "simulated tasks render with" in run.stdout:  # a GPU
        return
    if os.geteuid() == 0:
        assert "apt-get was asked: install -y libosmesa6" in run.stdout and "asked: update" in run.stdout
    assert "sudo apt-get install -y libosmesa6" in run.stdout


@needs_renderer
def test_workers_get_the_renderer_and_this_process_does_not():
    code = """
import json, os
before = dict(os.environ)
from xdfast.robot.sim.processes import spawning
with spawning():
    inside = dict(os.environ)
print(json.dumps([dict(os.environ) == before, inside["MUJOCO_GL"], inside["OMP_NUM_THREADS"], "PYOPENGL_PLATFORM" in inside]))
"""
    same, gl, threads, platform = run_python(code, MUJOCO_GL="", PYOPENGL_PLATFORM="glx")
    assert same and gl in ("egl", "osmesa") and threads == "1" and not platform
