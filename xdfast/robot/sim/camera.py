"""A fast offscreen camera for MuJoCo scenes: no shadows, reflections or multisampling. Only worker processes use it.

With software OpenGL a 96 px picture takes 6 ms like this and 80 ms with MuJoCo's defaults; it is the passes over the scene
that cost, not the pixels. The sky stays (1 % of the time): without it the background is black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xdfast._optional import require

__all__ = ["Camera", "View"]


@dataclass(frozen=True)
class View:
    """Where a named camera stands.

    Attributes:
        base: the model's camera it starts from.
        position: moved to, in metres in the world frame; None leaves it.
        rotation: its axes, row-major 3×3 in the world frame; None leaves them.
        flip: the camera is mounted upside down: the picture is turned by 180°.
    """

    base: str
    position: tuple[float, float, float] | None = None
    rotation: tuple[float, ...] | None = None
    flip: bool = False


class Camera:
    """Takes square pictures of one model.

    Args:
        model: ``mujoco.MjModel``; its visual quality settings are lowered.
        size: height and width in pixels.
        views: name → where it stands.
    """

    def __init__(self, model: Any, size: int, views: dict[str, View]) -> None:
        mujoco = require("mujoco", "robot", purpose="simulated tasks")
        # Multisampling and shadow maps are set up when the renderer is made, from these fields.
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._mujoco, self._model, self._views = mujoco, model, views
        self._ids = {name: model.camera(view.base).id for name, view in views.items()}
        self._renderer = mujoco.Renderer(model, size, size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def picture(self, data: Any, name: str) -> np.ndarray:
        """What a camera sees, uint8 ``[size, size, 3]``, upright. ``data`` (``mujoco.MjData``) is left as it was."""
        view, index = self._views[name], self._ids[name]
        position, rotation = data.cam_xpos[index].copy(), data.cam_xmat[index].copy()
        if view.position is not None:
            data.cam_xpos[index] = view.position
        if view.rotation is not None:
            data.cam_xmat[index] = view.rotation
        self._renderer.update_scene(data, camera=index)
        data.cam_xpos[index], data.cam_xmat[index] = position, rotation
        picture = self._renderer.render()
        return np.ascontiguousarray(picture[::-1, ::-1]) if view.flip else picture

    def close(self) -> None:
        """Frees the renderer.

        mujoco.Renderer.close() frees GL objects in whichever context happens to be current; with two renderers in a
        process that destroys the textures of the other. So ours is made current first.
        """
        renderer, self._renderer = self._renderer, None
        if renderer is None:
            return
        context = renderer._gl_context
        if context is not None:
            context.make_current()
        if renderer._mjr_context is not None:
            renderer._mjr_context.free()
        if context is not None:
            context.free()
        renderer._gl_context = renderer._mjr_context = None
