"""Which arrays of a foreign file are cameras, proprioception and actions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xdfast.errors import nearest
from xdfast.robot.demos.errors import DemoError

__all__ = ["ArrayInfo", "KeyMap", "StateKey", "choose_keys", "image_size", "to_uint8"]

_PART = re.compile(r"(?P<name>.+?)\[(?P<start>\d*):(?P<stop>\d*)\]")
_ARMS = ("robot0", "robot1")


@dataclass(frozen=True)
class ArrayInfo:
    """Shape with the steps first, and dtype, of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class StateKey:
    """An array, or the columns ``start:stop`` of it, that is a part of the proprioception."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def take(self, values: np.ndarray) -> np.ndarray:
        """float32 ``[T, size]`` from the array ``[T, …]``."""
        return np.asarray(values, np.float32).reshape(len(values), -1)[:, self.start : self.stop]


@dataclass(frozen=True)
class KeyMap:
    """The chosen arrays.

    Attributes:
        cameras: image arrays, in the order of the policy's inputs.
        state: parts of the proprioception, in the order they are put side by side.
        action: the array of actions.
    """

    cameras: tuple[str, ...]
    state: tuple[StateKey, ...]
    action: str

    @property
    def state_dim(self) -> int:
        return sum(key.size for key in self.state)

    def state_of(self, arrays: Mapping[str, np.ndarray], steps: int) -> np.ndarray:
        """float32 ``[steps, state_dim]``."""
        parts = [key.take(arrays[key.name]) for key in self.state]
        return np.concatenate(parts, 1) if parts else np.zeros((steps, 0), np.float32)


def choose_keys(
    observations: Mapping[str, ArrayInfo],
    *,
    where: str,
    cameras: Sequence[str] | None = None,
    state_keys: Sequence[str] | None = None,
    no_images: str = "",
) -> tuple[tuple[str, ...], tuple[StateKey, ...]]:
    """Cameras and proprioception among the arrays of ``observations``, by the caller's choice or by their names.

    Cameras by default: all arrays that look like images, in the order of ``observations``. Proprioception by default:
    ``agent_pos``; or ``state``; or each arm's ``robotN_eef_pos``, its rotation (``…_eef_quat`` or ``…_eef_rot_axis_angle``)
    and its fingers (``…_gripper_qpos`` or ``…_gripper_width``); or ``robot_eef_pose``: the first of these that is there.

    Args:
        observations: name → shape and dtype.
        where: the file, for messages.
        cameras: names of image arrays.
        state_keys: names, with columns if not all are wanted (``"state[:2]"``); empty: no proprioception.
        no_images: what to do about a file without images, for the message.

    Raises:
        DemoError: a name is not there, or is no image; no images; no array is known to be proprioception.
    """
    images = [name for name, info in observations.items() if image_size(info) is not None]
    if cameras is None:
        cameras = images
    if not cameras:
        raise DemoError(f"{where} has no images, which the policy needs{no_images}. It has: {_listed(observations)}")
    for name in cameras:
        _present(name, observations, where, "cameras")
        if name not in images:
            info = observations[name]
            raise DemoError(
                f"{where}: {name!r} cannot be a camera, it is {info.dtype} {list(info.shape)} and not an image of "
                f"[steps, height, width, 3] or [steps, 3, height, width]; images: {', '.join(images) or 'none'}"
            )
    low = {name: info for name, info in observations.items() if name not in images}
    if state_keys is None:
        state_keys = _known_state(low)
    if state_keys is None:
        raise DemoError(
            f"{where}: none of its arrays is known to be proprioception. Name them, in order, with state_keys "
            f"(--state-keys), or give none for a policy of pictures alone. It has: {_listed(low)}"
        )
    return tuple(cameras), tuple(_state_key(text, low, where) for text in state_keys)


def image_size(info: ArrayInfo) -> tuple[int, int] | None:
    """(height, width) of an array of colour images ``[T, H, W, 3]`` or ``[T, 3, H, W]``; None for anything else."""
    if len(info.shape) != 4 or not (info.dtype == np.uint8 or info.dtype.kind == "f"):
        return None
    if info.shape[3] == 3:
        return info.shape[1], info.shape[2]
    return (info.shape[2], info.shape[3]) if info.shape[1] == 3 else None


def to_uint8(frames: np.ndarray, what: str) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` from either order of axes; floats must be in 0..255, as diffusion_policy stores them.

    Raises:
        DemoError: floats that are not finite, beyond 0..255, or of 0..1.
    """
    if frames.shape[-1] != 3:
        frames = np.moveaxis(frames, 1, -1)
    if frames.dtype == np.uint8:
        return np.ascontiguousarray(frames)
    low, high = (float(frames.min()), float(frames.max())) if frames.size else (0.0, 0.0)
    if not (low >= 0 and high <= 255):  # also true of NaN
        raise DemoError(f"{what}: its values go from {low:g} to {high:g}, not from 0 to 255")
    if high <= 1 and not np.isin(frames, (0, 1)).all():
        raise DemoError(f"{what}: floats from {low:g} to {high:g}, scaled to 0..1; store them as uint8 or as 0..255")
    return np.rint(frames).astype(np.uint8)


def _known_state(low: Mapping[str, ArrayInfo]) -> list[str] | None:
    for name in ("agent_pos", "state"):
        if name in low:
            return [name]
    arms = []
    for arm in _ARMS:
        for choices in (("eef_pos",), ("eef_quat", "eef_rot_axis_angle"), ("gripper_qpos", "gripper_width")):
            arms += [f"{arm}_{part}" for part in choices if f"{arm}_{part}" in low][:1]
    return arms or (["robot_eef_pose"] if "robot_eef_pose" in low else None)


def _state_key(text: str, low: Mapping[str, ArrayInfo], where: str) -> StateKey:
    match = _PART.fullmatch(text)
    name = match["name"] if match and text not in low else text
    _present(name, low, where, "state_keys")
    columns = int(np.prod(low[name].shape[1:], dtype=np.int64))
    start, stop = 0, columns
    if match and name != text:
        start, stop = int(match["start"] or 0), int(match["stop"] or columns)
        if not start < stop <= columns:
            raise DemoError(f"{where}: {text!r} takes columns {start} to {stop} of an array that has {columns}")
    return StateKey(name, start, stop)


def _present(name: str, there: Mapping[str, ArrayInfo], where: str, option: str) -> None:
    if name not in there:
        raise DemoError(f"{where} has no {name!r} ({option}).{nearest(name, there)} It has: {_listed(there)}")


def _listed(arrays: Mapping[str, ArrayInfo]) -> str:
    return ", ".join(f"{name} {list(info.shape)} {info.dtype}" for name, info in arrays.items()) or "nothing"
