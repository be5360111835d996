"""Starts a task in this process, which must be one of the workers."""

from __future__ import annotations

import os
import sys

from xdfast.errors import nearest
from xdfast.robot.sim.gl import renderer
from xdfast.robot.sim.names import task_spec
from xdfast.robot.sim.task import Task, TaskSpec

__all__ = ["check_cameras", "check_image_size", "make_task"]


def check_image_size(size: int) -> None:
    """Raises ValueError unless ``size`` is an integer of 8 to 2048 pixels."""
    if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= 2048:
        raise ValueError(f"image_size={size!r} must be an integer from 8 to 2048 (pixels of a side)")


def check_cameras(spec: TaskSpec, cameras: tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    """The names of the cameras to use; None is the task's default camera.

    Raises:
        ValueError: a name the task does not have, one given twice, or none at all.
    """
    if cameras is None:
        return spec.cameras[:1]
    if isinstance(cameras, str):
        raise ValueError(f"cameras={cameras!r} must be a tuple of names: cameras=({cameras!r},)")
    if not cameras:
        raise ValueError(f"cameras={cameras!r} is empty; {spec.name} has {', '.join(spec.cameras)}")
    for name in cameras:
        if name not in spec.cameras:
            raise ValueError(
                f"{spec.name} has no camera {name!r}; it has {', '.join(spec.cameras)}.{nearest(name, spec.cameras)}"
            )
    if len(set(cameras)) != len(cameras):
        raise ValueError(f"cameras={tuple(cameras)!r}: each camera once")
    return tuple(cameras)


def _ready_to_render(spec: TaskSpec) -> None:
    """Makes sure that what renders is chosen, and that this process will not die of it."""
    if "torch" in sys.modules:
        raise RuntimeError(
            f"{spec.name} cannot be started in this process, which has torch loaded: software OpenGL and Triton in one "
            f"process end in a segmentation fault. Start it in one of its own: "
            f"xdfast.robot.sim.vector.vector_env({spec.name!r}, 1)"
        )
    if not os.environ.get("MUJOCO_GL"):  # workers are given it
        os.environ["MUJOCO_GL"] = renderer().name


def make_task(name: str | TaskSpec, image_size: int = 96) -> Task:
    """Starts a task's simulator and renderer in this process.

    A process that has torch is refused: it may come to use Triton, see :mod:`xdfast.robot.sim.gl`.

    Args:
        name: of the task, or its spec.
        image_size: height and width of a frame, in pixels.

    Raises:
        ValueError: unknown task or impossible size.
        RuntimeError: this process has torch loaded.
        NoRendererError: nothing can render here.
        ImportError: the robot extra is not installed.
    """
    spec = task_spec(name) if isinstance(name, str) else name
    check_image_size(image_size)
    _ready_to_render(spec)
    if spec.simulator == "metaworld":
        from xdfast.robot.sim.metaworld import MetaWorldTask

        return MetaWorldTask(spec, image_size)
    from xdfast.robot.sim.adroit import AdroitTask

    return AdroitTask(spec, image_size)
