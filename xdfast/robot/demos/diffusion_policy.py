"""Reads diffusion_policy's ReplayBuffer: zarr arrays ``data/*`` of all steps in a row, and ``meta/episode_ends``.

The layout is that of diffusion_policy/common/replay_buffer.py (github.com/real-stanford/diffusion_policy), which UMI and DP3
use as well: a folder ``NAME.zarr`` or the same as ``NAME.zarr.zip``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdfast._optional import require
from xdfast.errors import nearest
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.keys import ArrayInfo, KeyMap, choose_keys, image_size, to_uint8
from xdfast.robot.demos.source import hash_files

__all__ = ["DiffusionPolicySource"]


class DiffusionPolicySource:
    """Episodes of a ReplayBuffer.

    Args:
        path: the ``.zarr`` folder or the ``.zarr.zip`` file.
        cameras: arrays of ``data``; default: all that are images.
        state_keys: arrays of ``data``; default: see :func:`choose_keys`. PushT's ``state`` also has the block's pose, which
            diffusion_policy hides from image policies: give ``["state[:2]"]``.
        action_key: an array of ``data``; default ``"action"``.

    Raises:
        DemoError: damaged, incomplete, not a ReplayBuffer, empty, or a name is not there.
        ImportError: zarr is missing.
    """

    format = "diffusion_policy"
    task: str | None = None
    fps: float | None = None

    def __init__(
        self,
        path: Path,
        *,
        cameras: Sequence[str] | None = None,
        state_keys: Sequence[str] | None = None,
        action_key: str | None = None,
    ) -> None:
        self.path = path
        self._opened: tuple[int, Any] | None = None
        group = self._group()
        try:
            data, ends = group["data"], np.asarray(group["meta"]["episode_ends"][:])
            arrays = {name: data[name] for name in sorted(data.array_keys())}
        except Exception as error:  # zarr and its codecs raise errors of every kind
            raise self._error("it is not a ReplayBuffer (data/*, meta/episode_ends)", error) from error
        infos = {name: ArrayInfo(tuple(array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
        action = action_key or "action"
        if action not in infos:
            raise DemoError(
                f"{path} has no {action!r} (action_key).{nearest(action, infos)} It has: {', '.join(infos) or 'nothing'}"
            )
        observations = {name: info for name, info in infos.items() if name != action}
        chosen, state = choose_keys(observations, where=f"{path}: data", cameras=cameras, state_keys=state_keys)
        self.keys = KeyMap(chosen, state, action)
        self._check_ends(ends, {name: int(arrays[name].shape[0]) for name in self._names()})
        self._check_chunks({name: arrays[name] for name in self._names()})
        self._ends = [0, *(int(end) for end in ends)]
        self.lengths = [stop - start for start, stop in zip(self._ends, self._ends[1:])]
        self.action_dim = int(np.prod(infos[action].shape[1:], dtype=np.int64))
        self.state_dim = self.keys.state_dim
        self.image_sizes = {name: image_size(infos[name]) or (0, 0) for name in chosen}
        self.facts: dict[str, Any] = {
            "arrays": {name: [*info.shape, str(info.dtype)] for name, info in infos.items()},
            "state_keys": [f"{key.name}[{key.start}:{key.stop}]" for key in state],
            "action_key": action,
        }

    def read(self, i: int) -> Episode:
        """Episode ``i``. Raises: DemoError, if it cannot be read."""
        start, stop = self._ends[i], self._ends[i + 1]
        arrays = {}
        for name in self._names():
            try:
                arrays[name] = np.asarray(self._group()["data"][name][start:stop])
            except Exception as error:
                raise self._error(f"steps {start} to {stop} of data/{name} cannot be read", error) from error
        actions = np.asarray(arrays[self.keys.action], np.float32).reshape(stop - start, -1)
        images = {name: to_uint8(arrays[name], f"{self.where(i)}: data/{name}") for name in self.keys.cameras}
        return Episode(images, self.keys.state_of(arrays, stop - start), actions)

    def where(self, i: int) -> str:
        """``"FILE: episode 3"``."""
        return f"{self.path}: episode {i}"

    def content_hash(self, count: int) -> str:
        """SHA-256 of every file of the buffer and of what is taken from it."""
        files = [self.path] if self.path.is_file() else [f for f in self.path.rglob("*") if f.is_file()]
        return hash_files(files, self.path.parent, self.keys, self._ends[: count + 1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _names(self) -> list[str]:
        return [*self.keys.cameras, *dict.fromkeys(key.name for key in self.keys.state), self.keys.action]

    def _group(self) -> Any:
        """The root; opened once for each process (a zip's handle does not survive a fork, its index is slow to read)."""
        if self._opened is None or self._opened[0] != os.getpid():
            zarr = require("zarr", extra="robot", purpose="diffusion_policy's files")
            try:
                store = zarr.storage.ZipStore(self.path, mode="r") if self.path.is_file() else str(self.path)
                self._opened = os.getpid(), zarr.open_group(store, mode="r")
            except Exception as error:
                raise self._error(
                    "it is not zarr, or a zip with the .zarr folder inside it (then unpack it)", error
                ) from error
        return self._opened[1]

    def _check_ends(self, ends: np.ndarray, lengths: dict[str, int]) -> None:
        if len(ends) == 0:
            raise DemoError(f"{self.path} has no episodes: meta/episode_ends is empty")
        if (np.diff(ends, prepend=0) < 0).any():
            raise DemoError(f"{self.path}: meta/episode_ends is not ascending: {ends.tolist()[:20]}")
        for name, length in lengths.items():
            if length != ends[-1]:
                raise DemoError(
                    f"{self.path}: data/{name} has {length} steps, but the episodes end at {ends[-1]} (meta/episode_ends)"
                )

    def _check_chunks(self, arrays: dict[str, Any]) -> None:
        """zarr takes a missing file for zeros: a half-copied folder would be read as black pictures and zero actions."""
        for name, array in arrays.items():
            absent = array.nchunks - array.nchunks_initialized
            if absent:
                raise DemoError(
                    f"{self.path}: {absent} of {array.nchunks} chunks of data/{name} are missing; copy it again"
                )

    def _error(self, what: str, error: Exception) -> DemoError:
        # real-robot conversions compress pictures with JPEG 2000, a codec that neither zarr nor numcodecs brings
        codec = "imagecodecs" in str(error) or "codec not available" in str(error)
        hint = (
            "pip install imagecodecs and call imagecodecs.numcodecs.register_codecs() first"
            if codec
            else "copy it again"
        )
        return DemoError(f"{self.path}: {what} ({type(error).__name__}: {error}); {hint}")
