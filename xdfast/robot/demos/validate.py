"""What every episode of a data set must be: the same cameras and sizes, whole, finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xdfast.robot.demos.episode import Episode

__all__ = ["EpisodeSpec", "episode_problems"]


@dataclass(frozen=True)
class EpisodeSpec:
    """What the episodes of a data set have in common.

    Attributes:
        image_sizes: camera → (height, width) in pixels.
        action_dim: numbers in an action.
        state_dim: numbers of proprioception; 0: none is recorded.
    """

    image_sizes: Mapping[str, tuple[int, int]]
    action_dim: int
    state_dim: int


def episode_problems(episode: Episode, spec: EpisodeSpec) -> list[str]:
    """What keeps ``episode`` from being one of ``spec``, a sentence for each fault; an empty list when it is sound."""
    steps = len(episode.actions)
    if steps == 0:
        return ["it has no steps"]
    found = _matrix(episode.actions, "actions", steps, spec.action_dim)
    found += _matrix(episode.state, "state", steps, spec.state_dim)
    for camera in [name for name in spec.image_sizes if name not in episode.images]:
        found.append(f"camera {camera!r} is missing; it has: {_names(episode.images)}")
    for camera, frames in episode.images.items():
        if camera not in spec.image_sizes:
            found.append(f"camera {camera!r} is not one of the data set's ({_names(spec.image_sizes)})")
        else:
            found += _frames(frames, camera, steps, spec.image_sizes[camera])
    if episode.success is not None:
        found += _vector(episode.success, "success", steps, np.dtype(bool))
    for name, values in episode.info.items():
        found += _vector(values, f"info {name!r}", steps, np.dtype(np.float32))
    return found


def _matrix(values: np.ndarray, what: str, steps: int, size: int) -> list[str]:
    if values.dtype != np.float32:
        return [f"{what} are {values.dtype}, not float32"]
    if values.ndim != 2:
        return [f"{what} have the shape {list(values.shape)}, not [{steps}, {size}]"]
    if len(values) != steps:
        return [f"{what} have {len(values)} steps, the actions {steps}"]
    if values.shape[1] != size:
        return [f"{what} have {values.shape[1]} numbers a step, those of the data set {size}"]
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        step, column = (int(i) for i in bad[0])
        more = f" (and {len(bad) - 1} more such values)" if len(bad) > 1 else ""
        return [f"{what}: {values[step, column]} at step {step}, dimension {column}{more}"]
    return []


def _frames(frames: np.ndarray, camera: str, steps: int, size: tuple[int, int]) -> list[str]:
    if frames.dtype != np.uint8:
        return [f"camera {camera!r}: images are {frames.dtype}, not uint8"]
    if frames.ndim != 4 or frames.shape[-1] != 3:
        return [f"camera {camera!r}: images have the shape {list(frames.shape)}, not [steps, height, width, 3]"]
    if len(frames) != steps:
        return [f"camera {camera!r} has {len(frames)} frames for {steps} actions"]
    if frames.shape[1:3] != tuple(size):
        return [f"camera {camera!r}: images are {_size(frames.shape[1:3])}, those of the data set {_size(size)}"]
    return []


def _vector(values: np.ndarray, what: str, steps: int, dtype: np.dtype) -> list[str]:
    if values.dtype != dtype or values.shape != (steps,):
        return [f"{what} is {values.dtype} {list(values.shape)}, not {dtype} [{steps}]"]
    return []


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]}×{size[1]} (height × width)"


def _names(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
