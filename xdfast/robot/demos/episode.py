"""One demonstration in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Episode"]


@dataclass
class Episode:
    """T steps: what was seen and felt before each action, and the action.

    Attributes:
        images: camera → uint8 ``[T, H, W, 3]``.
        state: proprioception, float32 ``[T, P]``.
        actions: float32 ``[T, A]``.
        success: bool ``[T]``, whether the task was solved after the action of a step; None where a format does not tell.
        info: the simulator's scalars after each action, name → float32 ``[T]``.
        seed: of the simulator's reset; None if unknown.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    success: np.ndarray | None = None
    info: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.actions)
