"""Reads robomimic's HDF5: ``data/demo_I/{actions, obs/*}``, ``mask/*``, ``env_args``; without importing robomimic.

The layout is that of https://robomimic.github.io/docs/datasets/overview.html. The order of demonstrations is that of their
numbers (``demo_9`` before ``demo_10``), as robomimic itself reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from xdfast._optional import require
from xdfast.errors import nearest
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.keys import ArrayInfo, KeyMap, choose_keys, image_size, to_uint8
from xdfast.robot.demos.source import hash_files

__all__ = ["RobomimicSource"]

_RENDER = (
    ": robomimic's scripts/dataset_states_to_obs.py renders them (--camera_names agentview robot0_eye_in_hand), "
    "or download the image version of the data set"
)


class RobomimicSource:
    """Episodes of a robomimic file.

    Args:
        path: the ``.hdf5`` file.
        cameras: arrays of ``obs``; default: all that are images.
        state_keys: arrays of ``obs``; default: see :func:`choose_keys` (``object``, what only a simulator knows, is not).
        action_key: beside ``obs``; default ``"actions"``.
        mask: only the demonstrations of ``mask/NAME``.

    Raises:
        DemoError: damaged, not robomimic's, empty, or a name is not there.
        ImportError: h5py is missing.
    """

    format = "robomimic"

    def __init__(
        self,
        path: Path,
        *,
        cameras: Sequence[str] | None = None,
        state_keys: Sequence[str] | None = None,
        action_key: str | None = None,
        mask: str | None = None,
    ) -> None:
        self.path = path
        with self._file() as file:
            if "data" not in file:
                raise DemoError(
                    f"{path} is not robomimic's: it has no group 'data', but: {', '.join(file) or 'nothing'}"
                )
            data = file["data"]
            self._demos = _demos(path, file, mask)
            first = data[self._demos[0]]
            if "obs" not in first:
                raise DemoError(f"{path}: {self._demos[0]} has no observations (group 'obs'){_RENDER}")
            observations = {
                name: ArrayInfo(a.shape, a.dtype) for name, a in first["obs"].items() if hasattr(a, "dtype")
            }
            chosen, state = choose_keys(
                observations,
                where=f"{path}: {self._demos[0]}/obs",
                cameras=cameras,
                state_keys=state_keys,
                no_images=_RENDER,
            )
            action = action_key or "actions"
            for demo in self._demos:
                if action not in data[demo]:
                    there = [name for name in data[demo] if name != "obs"]
                    raise DemoError(
                        f"{path}: {demo} has no {action!r} (action_key).{nearest(action, there)} It has: {', '.join(there)}"
                    )
            self.keys = KeyMap(chosen, state, action)
            self.lengths = [len(data[demo][action]) for demo in self._demos]
            self.action_dim = int(first[action].shape[-1]) if first[action].ndim > 1 else 1
            env = _env_args(data.attrs.get("env_args"))
            masks = {name: len(values) for name, values in file["mask"].items()} if "mask" in file else {}
        self.state_dim = self.keys.state_dim
        self.image_sizes = {name: image_size(observations[name]) or (0, 0) for name in chosen}
        self.task = env.get("env_name")
        self.fps = env.get("env_kwargs", {}).get("control_freq")
        self.facts: dict[str, Any] = {
            "env_args": env,
            "masks": masks,
            "mask": mask,
            "state_keys": [f"{key.name}[{key.start}:{key.stop}]" for key in state],
            "action_key": action,
        }

    def read(self, i: int) -> Episode:
        """Episode ``i``; reward is kept as ``info["reward"]``. Raises: DemoError, if it cannot be read."""
        with self._file() as file:
            demo = file["data"][self._demos[i]]
            wanted = [*self.keys.cameras, *(key.name for key in self.keys.state)]
            absent = [name for name in wanted if name not in demo.get("obs", {})]
            if absent:
                raise DemoError(f"{self.where(i)} has no obs/{absent[0]}, which earlier demonstrations have")
            arrays = {name: demo["obs"][name][()] for name in wanted}
            actions = np.asarray(demo[self.keys.action][()], np.float32)
            reward = {"reward": np.asarray(demo["rewards"][()], np.float32)} if "rewards" in demo else {}
        images = {}
        for name in self.keys.cameras:
            if image_size(ArrayInfo(arrays[name].shape, arrays[name].dtype)) is None:
                raise DemoError(
                    f"{self.where(i)}: obs/{name} is {arrays[name].dtype} {list(arrays[name].shape)}, no images"
                )
            images[name] = to_uint8(arrays[name], f"{self.where(i)}: obs/{name}")
        lengths = {key.name: len(arrays[key.name]) for key in self.keys.state}
        if len(set(lengths.values())) > 1:
            raise DemoError(f"{self.where(i)}: arrays of different lengths: {lengths}")
        state = self.keys.state_of(arrays, len(actions))
        return Episode(images, state, actions.reshape(len(actions), -1), info=reward)

    def where(self, i: int) -> str:
        """``"FILE: demo_3"``."""
        return f"{self.path}: {self._demos[i]}"

    def content_hash(self, count: int) -> str:
        """SHA-256 of the whole file and of what is taken from it."""
        return hash_files([self.path], self.path.parent, self.keys, self._demos[:count])

    @contextmanager
    def _file(self) -> Iterator[Any]:
        """Opened for each use: HDF5 handles survive neither a fork nor pickling."""
        h5py = require("h5py", extra="robot", purpose="robomimic's files")
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        # h5py reports damage as any of these, depending on which of its structures is hit
        except (OSError, KeyError, RuntimeError, AttributeError, TypeError, OverflowError, UnicodeDecodeError) as error:
            raise DemoError(f"{self.path} is damaged or not HDF5: {error}; download or copy it again") from error


def _demos(path: Path, file: Any, mask: str | None) -> list[str]:
    """Names of the demonstrations, by number."""
    names = list(file["data"])
    if mask is not None:
        masks = list(file["mask"]) if "mask" in file else []
        if mask not in masks:
            raise DemoError(f"{path} has no mask {mask!r}.{nearest(mask, masks)} It has: {', '.join(masks) or 'none'}")
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in file["mask"][mask][()]]
        absent = [name for name in names if name not in file["data"]]
        if absent:
            raise DemoError(f"{path}: mask {mask!r} names {absent[0]!r}, which is not in the file")
    if not names:
        raise DemoError(f"{path} has no demonstrations" + (f" in mask {mask!r}" if mask else ""))
    strange = [name for name in names if not (name.startswith("demo_") and name[5:].isdigit())]
    if strange:
        raise DemoError(f"{path}: data/{strange[0]} is not the name of a demonstration (demo_0, demo_1, …)")
    return sorted(names, key=lambda name: int(name[5:]))


def _env_args(text: Any) -> dict[str, Any]:
    """The simulator's description; empty for robot data, which may have none."""
    try:
        values = json.loads(text) if text is not None else {}
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
