"""Which OpenGL renders: a GPU's through EGL where there is one, software otherwise; tried out in a process of its own.

This process never loads OpenGL: the LLVM inside Mesa's software renderers and Triton's do not get along (the process ends
in a segmentation fault). MuJoCo reads ``MUJOCO_GL`` when it is imported, so the choice is made for the children.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from glob import glob
from typing import NamedTuple

__all__ = ["INSTALL", "NoRendererError", "Renderer", "look_again", "renderer"]

#: What to do where nothing renders.
INSTALL = "install software OpenGL: `apt-get install libosmesa6` (or `make install-robot`, which does it)"

# Draws a red ball and looks at the middle of the picture. On stdout: who drew it. PyOpenGL reports errors of a missing
# library in its own roundabout ways, so the last line of stderr is all there is to say about a failure.
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('''<mujoco><worldbody><light pos="0 -2 2" dir="0 1 -1"/><geom size=".5"
  rgba="1 0 0 1"/><camera name="c" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/></worldbody></mujoco>''')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data, camera="c")
red, green, blue = (int(v) for v in renderer.render()[8, 8])
assert red > 2 * max(green, blue, 1), f"a red ball came out as {(red, green, blue)}"
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode(errors="replace"), flush=True)
import os
os._exit(0)  # some drivers crash while they are unloaded
"""


class NoRendererError(RuntimeError):
    """Nothing here can render; the message says what to install."""


class Renderer(NamedTuple):
    """What renders: the value of ``MUJOCO_GL`` (``"egl"``, ``"osmesa"``, …) and why it was chosen."""

    name: str
    reason: str


def renderer() -> Renderer:
    """The renderer of this machine, found out once a process (about half a second).

    ``MUJOCO_GL`` decides where it is set. Otherwise: EGL where there is a GPU or a render node and EGL works there; else
    OSMesa; else EGL in software, which some systems have without OSMesa.

    Raises:
        NoRendererError: nothing renders, or what ``MUJOCO_GL`` names does not.
        ImportError: mujoco is not installed.
    """
    return _choose(os.environ.get("MUJOCO_GL", "").strip().lower(), os.environ.get("LD_LIBRARY_PATH", ""))


def look_again() -> None:
    """Forgets what was found out, after something was installed."""
    _choose.cache_clear()


@functools.lru_cache(maxsize=8)
def _choose(asked: str, library_path: str) -> Renderer:
    del library_path  # part of the key only: with other libraries the answer may be another
    import importlib.util

    if importlib.util.find_spec("mujoco") is None:
        raise ImportError('mujoco is needed for simulated tasks and is not installed: pip install "xdfast[robot]"')
    if asked in ("disable", "disabled", "off", "false", "0"):
        raise NoRendererError(f"MUJOCO_GL={asked} turns rendering off: unset MUJOCO_GL")
    if asked:
        drew, failure = _probe(asked)
        if drew is None:
            hint = INSTALL if asked == "osmesa" else "unset MUJOCO_GL, and xdfast looks for a renderer that works"
            raise NoRendererError(f"MUJOCO_GL={asked} is set and does not render here ({failure}): {hint}")
        return Renderer(asked, f"MUJOCO_GL={asked} is set; {drew}")
    if sys.platform == "darwin":
        return Renderer("cgl", "macOS renders with its own OpenGL")
    why = "no GPU and no render node in /dev"
    if nodes := glob("/dev/dri/renderD*") + glob("/dev/nvidia[0-9]*"):
        drew, failure = _probe("egl")
        if drew is not None and "llvmpipe" not in drew.lower():
            return Renderer("egl", f"EGL works with {nodes[0]}; {drew}")
        why = f"EGL does not work with {nodes[0]} ({failure or drew})"
    drew, no_osmesa = _probe("osmesa")
    if drew is not None:
        return Renderer("osmesa", f"{why}, so in software; {drew}")
    drew, no_egl = _probe("egl")
    if drew is not None:
        return Renderer("egl", f"{why}, and no OSMesa, so EGL in software; {drew}")
    raise NoRendererError(f"no renderer for simulated tasks: {why}; OSMesa: {no_osmesa}; EGL: {no_egl}. Now {INSTALL}")


def _probe(name: str) -> tuple[str | None, str]:
    """(who drew the picture, "") or (None, why not)."""
    environment = {**os.environ, "MUJOCO_GL": name}
    environment.pop("PYOPENGL_PLATFORM", None)  # MuJoCo sets it itself; one left over from elsewhere stops it
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return None, "no picture within 120 s"
    if run.returncode == 0 and run.stdout.strip():
        return run.stdout.strip().splitlines()[-1], ""
    if run.returncode < 0:
        return None, f"the process died of signal {-run.returncode}"
    return None, _failure(name, run.stderr)


def _failure(name: str, stderr: str) -> str:
    """One line about a failed probe, with PyOpenGL's riddles for a missing library put in words."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    if "glGetError" in last or "OSMesaCreateContext" in last or "eglQueryDevices" in last:
        return f"the library {'libOSMesa' if name == 'osmesa' else 'libEGL'} is missing or broken"
    if "_mjr_context" in last or "exception str() failed" in last:  # raised by a destructor after the true error
        last = next((line for line in reversed(lines[:-1]) if "Error" in line), last)
    return last[:200]
