"""Training samples of a policy: windows of observations and actions cut from demonstrations."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["WindowBatch", "WindowLoader", "Windows"]

log = logging.getLogger("xdfast")


class Windows:
    """All frames of some demonstrations, and one sample per frame.

    The sample of frame t of an episode sees observations t - T + 1 .. t and predicts actions t - T + 1 .. t - T + H (the
    alignment of Diffusion Policy). Before the start and past the end of the episode the first and last frame repeat.

    Args:
        demos: an opened :class:`xdfast.robot.demos.Demonstrations`.
        cameras: which of its cameras; pictures of another size than the first one's are an error.
        n_obs: T.
        horizon: H.
        image_size: (height, width) pictures are brought to (antialiased); default: their own.
        scratch: folder for a file that holds the pictures where memory is too small for them.

    Attributes:
        images: uint8 ``[N, K, h, w, 3]``.
        state: float32 ``[N, P]``.
        actions: float32 ``[N, A]``.
        episodes: int64 ``[N]`` the episode a frame belongs to.

    Raises:
        ValueError: a camera the demonstrations do not have, cameras of different sizes.
    """

    def __init__(
        self,
        demos: Any,
        cameras: Sequence[str],
        *,
        n_obs: int,
        horizon: int,
        image_size: tuple[int, int] | None = None,
        scratch: Path | None = None,
    ) -> None:
        unknown = [camera for camera in cameras if camera not in demos.cameras]
        if unknown:
            raise ValueError(
                f"the demonstrations in {demos.path} have no camera {unknown[0]!r}; they have: {', '.join(demos.cameras)}"
            )
        sizes = {image_size or tuple(demos.image_sizes[camera]) for camera in cameras}
        if len(sizes) > 1:
            raise ValueError(f"cameras of different sizes {sorted(sizes)}; set image_size to bring them to one")
        self.n_obs, self.horizon = n_obs, horizon
        self.image_size: tuple[int, int] = sizes.pop() if sizes else (0, 0)  # type: ignore[assignment]
        frames = sum(demos.lengths)
        self.images = _room((frames, len(cameras), *self.image_size, 3), scratch)
        self.state = torch.empty((frames, demos.state_dim))
        self.actions = torch.empty((frames, demos.action_dim))
        self.episodes = torch.repeat_interleave(torch.arange(len(demos)), torch.tensor(demos.lengths))
        starts = np.concatenate([[0], np.cumsum(demos.lengths)])
        for number in range(len(demos)):
            episode, rows = demos.episode(number), slice(starts[number], starts[number + 1])
            for k, camera in enumerate(cameras):
                self.images[rows, k] = _resized(torch.from_numpy(episode.images[camera]), self.image_size)
            self.state[rows] = torch.from_numpy(episode.state)
            self.actions[rows] = torch.from_numpy(episode.actions)
        self._first = torch.from_numpy(starts)[:-1][self.episodes]
        self._last = torch.from_numpy(starts)[1:][self.episodes] - 1

    def __len__(self) -> int:
        return len(self.actions)

    def observed(self, ids: Tensor) -> Tensor:
        """Rows of the T observations of each sample, int64 ``[B, T]``."""
        rows = ids[:, None] + torch.arange(1 - self.n_obs, 1)
        return torch.maximum(rows, self._first[ids][:, None])

    def predicted(self, ids: Tensor) -> Tensor:
        """Rows of the H actions of each sample, int64 ``[B, H]``."""
        rows = ids[:, None] + torch.arange(1 - self.n_obs, 1 - self.n_obs + self.horizon)
        rows = torch.maximum(rows, self._first[ids][:, None])
        return torch.minimum(rows, self._last[ids][:, None])


@dataclass
class WindowBatch:
    """B samples.

    Attributes:
        ids: int64 ``[B]`` frames.
        images: uint8 ``[B, K, T, h, w, 3]``, or float features ``[B, K, T, D]`` of a frozen encoder.
        state: float32 ``[B, T, P]``, raw.
        actions: float32 ``[B, H, A]``, raw.
    """

    ids: Tensor
    images: Tensor
    state: Tensor
    actions: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class WindowLoader:
    """Batches of windows in random order, a pure function of (seed, step, rank): a run continues anywhere.

    Samples come from one endless sequence of passes, each a shuffle of all of them. An "epoch" of the training loop is a
    number of steps here, whatever the number of samples.

    Args:
        windows: samples.
        batch_size: B of each process.
        steps: in an epoch.
        seed: of the shuffles.
        rank, world_size: this process among all.
        features: ``[J, N, K, D]`` of a frozen encoder for J fixed crops of every frame; one of the J is drawn per sample.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        features: Tensor | None = None,
    ) -> None:
        self.windows, self.batch_size, self.batches_per_epoch = windows, batch_size, steps
        self.bad: dict[str, str] = {}
        self._seed, self._rank, self._world, self._features = seed, rank, world_size, features
        self._pass: tuple[int, np.ndarray] | None = None

    def rows(self, index: int) -> int:
        """Samples of a step, all processes together."""
        return self.batch_size * self._world

    def epoch(self, epoch: int, start: int = 0) -> Iterator[WindowBatch]:
        """Batches ``start``, ``start + 1``, … of an epoch."""
        for index in range(start, self.batches_per_epoch):
            yield self.batch(epoch * self.batches_per_epoch + index)

    def batch(self, step: int) -> WindowBatch:
        """The batch of a step, counted from the start of the run."""
        first = step * self.batch_size * self._world + self._rank * self.batch_size
        ids = torch.tensor([self._sample(first + i) for i in range(self.batch_size)])
        windows = self.windows
        seen, acted = windows.observed(ids), windows.predicted(ids)
        if self._features is None:
            images = windows.images[seen].movedim(1, 2)  # [B, T, K, …] → [B, K, T, …]
        else:
            draw = np.random.default_rng((self._seed, 1, step, self._rank))
            which = torch.from_numpy(draw.integers(0, len(self._features), len(ids)))
            images = self._features[which[:, None], seen].movedim(1, 2)
        return WindowBatch(ids, images, windows.state[seen], windows.actions[acted])

    def _sample(self, position: int) -> int:
        number, offset = divmod(position, len(self.windows))
        if self._pass is None or self._pass[0] != number:
            self._pass = number, np.random.default_rng((self._seed, 0, number)).permutation(len(self.windows))
        return int(self._pass[1][offset])


def _room(shape: tuple[int, ...], scratch: Path | None) -> Tensor:
    """Memory for the pictures; a file that is mapped into it where they would take more than half of what is free.

    Raises:
        ValueError: there is neither memory nor a folder.
    """
    needed, free = math.prod(shape), _free_memory()
    if needed <= free // 2:
        return torch.empty(shape, dtype=torch.uint8)
    facts = f"the pictures take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free"
    if scratch is None:
        raise ValueError(f"{facts}; use a smaller image_size, fewer demonstrations (demo_limit), or another machine")
    file = scratch / "pictures.u8"
    log.info("%s: they go into %s", facts, file)
    scratch.mkdir(parents=True, exist_ok=True)
    images = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    file.unlink()  # the mapping keeps it; it is gone when the process is
    return torch.from_numpy(images)


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 ``[T, H, W, 3]`` → uint8 ``[T, h, w, 3]``."""
    if tuple(images.shape[1:3]) == tuple(size):
        return images
    small = F.interpolate(images.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1)
