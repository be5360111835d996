"""Adroit: a 24-joint hand with a pen, a door, a hammer or a ball (gymnasium-robotics). Only worker processes make these."""

from __future__ import annotations

import contextlib
import io

import numpy as np

from xdfast._optional import require
from xdfast.robot.sim.camera import Camera, View
from xdfast.robot.sim.pristine import Pristine
from xdfast.robot.sim.task import StepResult, TaskSpec

__all__ = ["AdroitTask"]

_HAND_JOINTS = 24
_TURNED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)  # looks straight down, turned by 180°

#: VRL3 and 3D Diffusion Policy look down on door and hammer with a camera that gymnasium-robotics' scenes do not have.
_TOP = {
    "door": View("fixed", position=(0.0, 0.0, 1.5), rotation=_TURNED),
    "hammer": View("fixed", position=(0.0, 0.0, 1.1), rotation=_TURNED),
}


class AdroitTask:
    """One Adroit scene; see :class:`xdfast.robot.sim.task.Task`.

    The state is what RRL, VRL3 and 3D Diffusion Policy give their policies: the angles of the hand's 24 joints (wrist and
    fingers), in radians; not the arm's joints, and never the object's pose or the target's.

    Args:
        spec: from :func:`xdfast.robot.sim.names.task_spec`.
        image_size: of a frame, in pixels.
    """

    def __init__(self, spec: TaskSpec, image_size: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # prints a notice about rewards, of which success is no part
            require("gymnasium_robotics", "robot", purpose="the Adroit tasks")
        self._mujoco = require("mujoco", "robot", purpose="the Adroit tasks")
        module = require(f"gymnasium_robotics.envs.adroit_hand.adroit_{spec.env}", "robot", purpose="the Adroit tasks")
        self.spec = spec
        # The class itself: gymnasium.make would wrap it in a time limit and order checks that are ours to decide.
        self._env = getattr(module, f"AdroitHand{spec.env.capitalize()}Env")()
        first = self._env.model.joint("WRJ1").qposadr[0]
        self._hand = slice(first, first + _HAND_JOINTS)
        self._pristine = Pristine(self._env)
        views = {name: _TOP[spec.env] if name == "top" else View(name) for name in spec.cameras}
        self._camera = Camera(self._env.model, image_size, views)

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed."""
        self._pristine.restore()
        self._env.reset(seed=seed)
        self._mujoco.mj_forward(self._env.model, self._env.data)

    def step(self, action: np.ndarray) -> StepResult:
        """Applies an action float ``[A]``: a target for every actuator, -1 and 1 the ends of its range."""
        action = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        _, reward, _, _, info = self._env.step(action)
        return StepResult(float(np.asarray(reward).item()), bool(np.asarray(info["success"]).item()))

    def state(self) -> np.ndarray:
        """Angles of the hand's joints, float32 ``[24]``, radians."""
        return self._env.data.qpos[self._hand].astype(np.float32)

    def frame(self, camera: str) -> np.ndarray:
        """uint8 ``[H, W, 3]``, upright."""
        return self._camera.picture(self._env.data, camera)

    def expert(self) -> np.ndarray:
        """Adroit has none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.spec.name} has no scripted expert: bring demonstrations (xdfast.robot.demos reads LeRobot, "
            "diffusion_policy and robomimic datasets)"
        )

    def close(self) -> None:
        """Frees the renderer."""
        self._camera.close()
