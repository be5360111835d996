"""Starting worker processes that render: the right environment for them, and nothing of the main script in them."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

from xdfast.robot.sim.gl import renderer

__all__ = ["WorkerError", "become_worker", "cause_of_death", "spawning"]

# One core each: the workers are what runs in parallel. LP_NUM_THREADS is Mesa's software renderer.
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_LOCK = threading.Lock()


class WorkerError(RuntimeError):
    """A simulator process failed, died or hung; the message names the task and the worker."""


@contextlib.contextmanager
def spawning() -> Iterator[multiprocessing.context.SpawnContext]:
    """The context to start render workers in; processes started inside inherit what they need.

    * ``MUJOCO_GL`` and one thread for numerical libraries, in the children's environment only.
    * The main module is hidden. A spawned process normally runs the user's script again (as ``__mp_main__``): without an
      ``if __name__ == "__main__"`` guard that ends in an error about bootstrapping, and with it the worker would import
      whatever the script imports, torch and Triton among it, which must not meet software OpenGL in one process. Nothing
      the workers are given lives in the main module.

    Raises:
        NoRendererError: nothing can render here.
        ImportError: mujoco is not installed.
    """
    changed = {"MUJOCO_GL": renderer().name, "LP_NUM_THREADS": "0", **dict.fromkeys(_ONE_THREAD, "1")}
    removed = ("PYOPENGL_PLATFORM",)  # MuJoCo sets it to match MUJOCO_GL and refuses another value
    with _LOCK:
        before = {name: os.environ.get(name) for name in (*changed, *removed)}
        main = sys.modules["__main__"]
        os.environ.update(changed)
        for name in removed:
            os.environ.pop(name, None)
        # multiprocessing.spawn.get_preparation_data looks at __spec__ and __file__ of this module.
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield multiprocessing.get_context("spawn")
        finally:
            sys.modules["__main__"] = main
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def become_worker() -> None:
    """First call in a worker: it leaves Ctrl-C to the main process, and dies with it.

    A daemon process is ended when the main process exits in order, not when that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("become_worker is for processes started by multiprocessing")
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def cause_of_death(exitcode: int | None) -> str:
    """``killed by SIGKILL (out of memory?)``, ``ended with exit code 1``."""
    if exitcode is None:
        return "does not answer"
    if exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {exitcode}"
