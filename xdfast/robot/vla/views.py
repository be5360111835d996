"""Samples of several tasks under a few fixed views each: what a teacher said of one can be kept and read again."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.robot.vla.instructions import Tokenizer
from xdfast.robot.vla.multitask import MultiTaskLoader, MultiTaskWindows, VLABatch

__all__ = ["ViewBatch", "ViewLoader", "shifted"]


@dataclass
class ViewBatch(VLABatch):
    """B samples, each under one of its views.

    Attributes:
        views: int64 ``[B]``, 0 … K − 1.
        step: of the training, counted from 0; -1 where there is none.
    """

    views: Tensor
    step: int = -1


class ViewLoader(MultiTaskLoader):
    """As :class:`MultiTaskLoader`, but every sample has K fixed views, taken in turns from one pass over its task to the next.

    View 0 is the sample as it is, with its task's usual instruction: what a policy sees when it acts. In the others every
    picture is moved by up to ``shift`` pixels both ways (its border repeats), and the sentence is drawn. A view is a pure
    function of (seed, sample, view): any process, now or later, gets the same tensors.

    A policy that cuts the middle out of its pictures sees of moved ones what a crop at random shows.

    Args:
        data, tokenizer, text_length, batch_size, steps, seed, rank, world_size: of :class:`MultiTaskLoader`.
        views: K.
        shift: pixels.

    Raises:
        ValueError: K < 1, a negative shift; as :class:`MultiTaskLoader`.
    """

    def __init__(
        self,
        data: MultiTaskWindows,
        tokenizer: Tokenizer,
        text_length: int,
        batch_size: int,
        steps: int,
        *,
        views: int,
        shift: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(data, tokenizer, text_length, batch_size, steps, seed=seed, rank=rank, world_size=world_size)
        if views < 1 or shift < 0:
            raise ValueError(f"views must be ≥ 1 and shift ≥ 0, got views={views} and shift={shift}")
        self.views, self.shift = views, shift

    @classmethod
    def like(cls, other: ViewLoader, steps: int) -> ViewLoader:
        """The same samples and views, in epochs of another number of steps."""
        made = copy.copy(other)
        made.batches_per_epoch, made._passes = steps, {}
        return made

    def facts(self) -> dict[str, Any]:
        """Everything the views depend on besides the samples."""
        return {
            "views": self.views,
            "shift": self.shift,
            "seed": self._seed,
            "instructions": hashlib.sha256(b"".join(e.numpy().tobytes() for e in self._encoded)).hexdigest()[:16],
        }

    def batch(self, step: int) -> ViewBatch:
        """The batch of a step, counted from the start of the run."""
        tasks, local, numbers = self._drawn(step)
        return self._seen(tasks, local, numbers % self.views, step)

    def visited(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, views) that the first so many steps of a run show to any process, each once, in order; int64."""
        seen: set[tuple[int, int]] = set()
        for step in range(steps):
            for rank in range(self._world):
                tasks, local, numbers = self._drawn(step, rank)
                ids = local + self.data.starts[tasks]
                seen.update(zip(ids.tolist(), (numbers % self.views).tolist()))
        rows = np.array(sorted(seen), dtype=np.int64).reshape(-1, 2)
        return rows[:, 0], rows[:, 1]

    def read(self, ids: Any, views: Any) -> ViewBatch:
        """Samples by their number among all tasks', each under the view asked for.

        Args:
            ids, views: integers ``[B]``.
        """
        ids, views = torch.as_tensor(ids), torch.as_tensor(views)
        tasks = torch.bucketize(ids.contiguous(), self.data.starts[1:], right=True)
        return self._seen(tasks, ids - self.data.starts[tasks], views, -1)

    def _seen(self, tasks: Tensor, local: Tensor, views: Tensor, step: int) -> ViewBatch:
        ids, images, state, actions = self._gathered(tasks, local)
        told = []
        for row, (number, view, task) in enumerate(zip(ids.tolist(), views.tolist(), tasks.tolist())):
            ways = self._encoded[task]
            if view == 0:
                told.append(ways[0])
                continue
            draw = np.random.default_rng((self._seed, 2, number, view))
            told.append(ways[int(draw.integers(len(ways)))])
            moves = draw.integers(-self.shift, self.shift + 1, (images.shape[1], 2)).tolist()
            images[row] = torch.stack([shifted(picture, *move) for picture, move in zip(images[row], moves)])
        return ViewBatch(ids, images, state, actions, torch.stack(told), tasks, views, step)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """``[..., h, w, 3]`` seen through a window moved by so many pixels; what lies beyond the border repeats it."""
    height, width = images.shape[-3:-1]
    rows = (torch.arange(height) + down).clamp_(0, height - 1)
    columns = (torch.arange(width) + right).clamp_(0, width - 1)
    return images[..., rows[:, None], columns, :]
