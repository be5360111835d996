"""A task as a Gymnasium environment that takes chunks of actions; the simulator starts at the first reset."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from xdfast._optional import require
from xdfast.robot.sim.make import check_cameras, check_image_size, make_task
from xdfast.robot.sim.names import task_spec
from xdfast.robot.sim.task import Task, TaskSpec

require("gymnasium", "robot", purpose="simulated tasks")  # a missing extra is said in words
import gymnasium  # noqa: E402

__all__ = ["SimEnv", "check_actions"]


def check_actions(spec: TaskSpec, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float32 actions of exactly ``shape``, all finite.

    Raises:
        ValueError: another shape, or a NaN or infinite number; the message says which.
    """
    array = np.asarray(actions)
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise ValueError(
            f"actions for {spec.name} must be numbers {list(shape)} (… steps, {spec.action_dim} numbers a step), got "
            f"{array.dtype} {list(array.shape)}"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"actions for {spec.name} contain {array[where]} at index {where}: the policy gave no number")
    return array


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


class SimEnv(gymnasium.Env):
    """Runs a task in chunks: one observation, several actions, the next observation.

    The spaces are known without a simulator, and neither MuJoCo nor OpenGL is loaded before the first ``reset``: the main
    process may hold such an environment, and :func:`xdfast.robot.sim.vector.vector_env` runs them in processes of their
    own.

    * observation: ``{"images": uint8 [C, n_obs, H, W, 3], "state": float32 [n_obs, P]}``, the latest last; after a reset
      the first observation is repeated. Only frames that an observation needs are rendered.
    * action: float32 ``[chunk, A]``, executed in order until the task succeeds or the time is up.
    * reward: the simulator's, summed over the chunk. terminated: the task succeeded. truncated: ``max_steps`` reached.
    * info: ``success`` (bool), ``steps`` (of the episode so far), ``executed`` (of this chunk).

    After its end an episode stays as it is: a step executes nothing (``executed`` is 0) and returns the last observation
    again. So the environments of a vector that finish early can wait for the others.

    Args:
        task: name, see :func:`xdfast.robot.sim.names.task_spec`.
        image_size: height and width of the frames.
        cameras: names; None is the task's default camera.
        n_obs: observation steps.
        chunk: actions a step.
        max_steps: of an episode; None is the task's own limit.

    Raises:
        ValueError: an unknown task or camera (the message has the nearest names), a size or number out of range.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        task: str,
        *,
        image_size: int = 96,
        cameras: tuple[str, ...] | None = None,
        n_obs: int = 1,
        chunk: int = 8,
        max_steps: int | None = None,
    ) -> None:
        self.task_spec = spec = task_spec(task)
        check_image_size(image_size)
        self._image_size = image_size
        self.cameras = check_cameras(spec, cameras)
        self._n_obs, self._chunk = _count("n_obs", n_obs), _count("chunk", chunk)
        self._max_steps = spec.max_steps if max_steps is None else _count("max_steps", max_steps)
        images = (len(self.cameras), n_obs, image_size, image_size, 3)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Box(0, 255, images, np.uint8),
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (n_obs, spec.state_dim), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (chunk, spec.action_dim), np.float32)
        self._task: Task | None = None
        self._recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=n_obs)  # (images [C, H, W, 3], state [P])
        self._steps = 0
        self._success = self._over = False
        self._record: Path | None = None
        self._film: list[np.ndarray] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts the episode of ``seed``; the same seed gives the same episode in any process.

        Args:
            seed: None draws one.
            options: ``{"record": path}`` films the episode with the first camera, written as mp4 when it ends. An episode
                left before its end is not written.

        Raises:
            ValueError: an unknown option, a negative seed, or a recording that does not end in ``.mp4``.
        """
        options = options or {}
        if unknown := set(options) - {"record"}:
            raise ValueError(f"unknown reset option {sorted(unknown)[0]!r}; known: 'record'")
        record = options.get("record")
        if record is not None and Path(record).suffix.lower() != ".mp4":
            raise ValueError(f"record={str(record)!r} must end in .mp4")
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        if self._task is None:
            self._task = make_task(self.task_spec, self._image_size)
        self._task.reset(seed)
        self._steps, self._success, self._over = 0, False, False
        self._record, self._film = (Path(record) if record is not None else None), []
        first = self._look(self._task)
        self._recent.extend([first] * self._n_obs)
        return self._observation(), {"success": False, "steps": 0, "executed": 0}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes a chunk, float ``[chunk, A]``; numbers beyond [-1, 1] are clipped.

        Raises:
            ValueError: actions of another shape, or NaN or infinite ones.
            RuntimeError: ``reset`` was not called.
        """
        if self._task is None:
            raise RuntimeError("reset comes before step")
        actions = check_actions(self.task_spec, action, (self._chunk, self.task_spec.action_dim))
        reward, executed = 0.0, 0
        while executed < self._chunk and not self._over:
            result = self._task.step(actions[executed])
            executed += 1
            self._steps += 1
            reward += result.reward
            self._success = result.success
            self._over = self._success or self._steps >= self._max_steps
            # Seen are the last n_obs steps of a chunk, and the one that ends the episode.
            seen = self._over or executed > self._chunk - self._n_obs
            if seen or self._record is not None:
                look = self._look(self._task)
                if seen:
                    self._recent.append(look)
        if executed and self._over and self._record is not None:
            from xdfast.robot.video import write_mp4

            write_mp4(self._record, self._film, self.task_spec.fps)
            self._film = []
        info = {"success": self._success, "steps": self._steps, "executed": executed}
        return self._observation(), reward, self._success, self._over and not self._success, info

    def close(self) -> None:
        """Frees the simulator."""
        if self._task is not None:
            self._task.close()
            self._task = None

    def _look(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([task.frame(camera) for camera in self.cameras])
        if self._record is not None:
            self._film.append(images[0])
        return images, task.state()

    def _observation(self) -> dict[str, np.ndarray]:
        images = np.stack([images for images, _ in self._recent], axis=1)
        return {"images": images, "state": np.stack([state for _, state in self._recent])}
