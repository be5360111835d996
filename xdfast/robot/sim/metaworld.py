"""MetaWorld v3: a Sawyer arm over a table, 50 tasks, each with a scripted expert. Only worker processes make these."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np

from xdfast._optional import require
from xdfast.robot.sim.camera import Camera, View
from xdfast.robot.sim.pristine import Pristine
from xdfast.robot.sim.task import StepResult, TaskSpec

__all__ = ["MetaWorldTask"]

# corner2, corner3, corner4 and the gripper's cameras are mounted upside down in MetaWorld's XML.
_VIEWS = {
    "dp3": View("corner2", position=(0.6, 0.295, 0.8), flip=True),
    "corner": View("corner", flip=True),
    "corner2": View("corner2", flip=True),
    "corner3": View("corner3", flip=True),
    "corner4": View("corner4", flip=True),
    "topview": View("topview"),
    "behindGripper": View("behindGripper"),
    "gripperPOV": View("gripperPOV"),
}


class MetaWorldTask:
    """One MetaWorld scene; see :class:`xdfast.robot.sim.task.Task`.

    The state is what 3D Diffusion Policy gives its policies: the end effector's position and those of the right and the
    left finger, in metres, 9 numbers. The goal's position is never in it: a policy sees the goal only as far as the
    picture shows it. Experts get MetaWorld's full observation of 39 numbers, goal included.

    Args:
        spec: from :func:`xdfast.robot.sim.names.task_spec`.
        image_size: of a frame, in pixels.
    """

    def __init__(self, spec: TaskSpec, image_size: int) -> None:
        tables = require("metaworld.env_dict", "robot", purpose="the MetaWorld tasks")
        policies = require("metaworld.policies", "robot", purpose="the MetaWorld experts")
        self._mujoco = require("mujoco", "robot", purpose="the MetaWorld tasks")
        # Experts ask for more than [-1, 1] by design; said at every step otherwise.
        warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high", category=UserWarning)
        self.spec = spec
        env = tables.ALL_V3_ENVIRONMENTS[spec.env]()
        env._partially_observable = False  # experts need the goal
        vars(env).pop("sawyer_observation_space", None)  # cached for a hidden goal, to whose zeros it would be clipped
        env._freeze_rand_vec, env.seeded_rand_vec = False, True  # objects and goal from the seed given to seed()
        env._set_task_called = True
        env.max_path_length = sys.maxsize  # whoever runs the episode says when it ends
        self._env = env
        self._expert_class = policies.ENV_POLICY_MAP[spec.env]
        self._pristine = Pristine(env)
        self._camera = Camera(env.model, image_size, _VIEWS)
        self._observation: np.ndarray | None = None
        self._expert: Any = None

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed (about 15 ms)."""
        self._pristine.restore()
        self._mujoco.mj_resetData(self._env.model, self._env.data)
        self._env.seed(seed)
        self._observation, _ = self._env.reset()
        self._mujoco.mj_forward(self._env.model, self._env.data)  # bodies moved last are drawn where they are
        self._expert = self._expert_class()

    def step(self, action: np.ndarray) -> StepResult:
        """Applies an action float ``[4]``: the end effector's shift in x, y, z (1 is a centimetre) and the gripper."""
        action = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._observation, reward, _, _, info = self._env.step(action)
        scalars = {name: float(value) for name, value in info.items() if np.ndim(value) == 0}
        return StepResult(float(reward), bool(info["success"]), scalars)

    def state(self) -> np.ndarray:
        """End effector, right finger, left finger: float32 ``[9]``, metres."""
        data = self._env.data
        parts = (data.body("hand").xpos, data.site("rightEndEffector").xpos, data.site("leftEndEffector").xpos)
        return np.concatenate(parts).astype(np.float32)

    def frame(self, camera: str) -> np.ndarray:
        """uint8 ``[H, W, 3]``, upright."""
        return self._camera.picture(self._env.data, camera)

    def expert(self) -> np.ndarray:
        """The scripted expert's action, float32 ``[4]`` in [-1, 1]."""
        return np.clip(self._expert.get_action(self._observation), -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Frees the renderer."""
        self._camera.close()
