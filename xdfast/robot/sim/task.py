"""What a simulated task is to the rest of xdfast: one small interface, whatever simulator stands behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

__all__ = ["StepResult", "Task", "TaskSpec"]


@dataclass(frozen=True)
class TaskSpec:
    """A task before any simulator is started.

    Attributes:
        name: ``"metaworld/drawer-open-v3"``: simulator, slash, the simulator's own name.
        simulator: ``"metaworld"`` or ``"adroit"``.
        env: the simulator's own name.
        action_dim: numbers in an action, each in [-1, 1].
        state_dim: numbers of proprioception.
        cameras: names of its cameras; the first is the default.
        max_steps: an episode ends after so many.
        fps: control frequency in Hz, the speed at which a video looks real.
        has_expert: whether a scripted expert exists.
        instruction: what the robot is to do, in words.
    """

    name: str
    simulator: str
    env: str
    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    max_steps: int
    fps: int
    has_expert: bool
    instruction: str


@dataclass
class StepResult:
    """What one step gave.

    Attributes:
        reward: the simulator's.
        success: whether the task is solved in this step; an episode succeeds when any step does.
        info: the simulator's own scalars (``near_object``, ``obj_to_target``, …).
    """

    reward: float
    success: bool
    info: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """One simulated scene. ``reset`` comes first; the same seed gives the same episode."""

    spec: TaskSpec

    def reset(self, seed: int) -> None:
        """Starts the episode of this seed."""

    def step(self, action: np.ndarray) -> StepResult:
        """Applies an action float ``[A]``; values beyond [-1, 1] are clipped."""

    def state(self) -> np.ndarray:
        """Proprioception, float32 ``[P]``."""

    def frame(self, camera: str) -> np.ndarray:
        """What a camera sees now, uint8 ``[H, W, 3]``, upright."""

    def expert(self) -> np.ndarray:
        """The scripted expert's action for the present state, float32 ``[A]`` in [-1, 1]."""

    def close(self) -> None:
        """Frees the renderer."""
