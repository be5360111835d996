"""Which images make which batch: a function of (seed, epoch, rank), with no state to save."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xdfast.data._rng import hash64

__all__ = ["BatchPlan", "EpochPlan"]

log = logging.getLogger("xdfast")

_ORDER = 0x4F524452
_VIEW_OF = 0x4B564945
PADDING = -1


@dataclass(frozen=True)
class BatchPlan:
    """One batch before it is read.

    Attributes:
        ids: int64 ``[B]`` positions in the source, -1 where a rank has no image left (evaluation).
        views: int64 ``[B]`` which view of each: the epoch, or one of K; 0 in evaluation.
    """

    ids: np.ndarray
    views: np.ndarray


class EpochPlan:
    """Batches of every epoch, for one rank.

    Batch ``b`` of all ranks together is a contiguous piece of the epoch's order, dealt to the ranks like cards. Every rank
    gets the same number of batches. In training the last, incomplete batch is dropped (``drop_last``) or filled up to equal
    parts from the start of the order; in evaluation every image comes once and shorter parts are filled with
    :data:`PADDING`.

    Args:
        count: N, images in the source.
        batch_size: images per batch and rank.
        train: shuffled, or in the order of the source.
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        drop_last: leaves out the incomplete batch; default: in training.
        views: K, fixed views of each image, taken in turns over the epochs, not all images the same one; None: a new view in
            every epoch.

    Raises:
        ValueError: fewer images than processes in training, or a value out of range.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        train: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool | None,
        views: int | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("views", 1 if views is None else views),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank!r}")
        if count < 1:
            raise ValueError("the source has no images")
        if train and count < world_size:
            raise ValueError(
                f"{count} training images cannot be shared by {world_size} processes; use at most {count} processes"
            )
        drop_last = train if drop_last is None else drop_last
        if drop_last and count < batch_size * world_size:
            shrunk = max(1, count // world_size)
            log.info(
                "batches of %d instead of %d images: there are only %d for %d process(es)",
                shrunk,
                batch_size,
                count,
                world_size,
            )
            batch_size = shrunk
        self.count, self.batch_size, self.train, self.seed = count, batch_size, train, seed
        self.rank, self.world_size, self.views = rank, world_size, views
        whole = batch_size * world_size
        self.batches_per_epoch = max(1, count // whole) if drop_last else -(-count // whole)

    def order(self, epoch: int) -> np.ndarray:
        """int64 ``[N]``: the order of an epoch, the same on every rank."""
        ids = np.arange(self.count, dtype=np.int64)
        if not self.train:
            return ids
        return np.argsort(hash64(self.seed, _ORDER, epoch, ids), kind="stable")

    def batches(self, epoch: int, start: int) -> Iterator[BatchPlan]:
        """The batches of an epoch from number ``start`` on."""
        order = self.order(epoch)
        whole = self.batch_size * self.world_size
        for number in range(start, self.batches_per_epoch):
            piece = order[number * whole : (number + 1) * whole]
            missing = -len(piece) % self.world_size
            if missing:
                filler = order[:missing] if self.train else np.full(missing, PADDING, dtype=np.int64)
                piece = np.concatenate((piece, filler))
            ids = piece[self.rank :: self.world_size]
            yield BatchPlan(ids, self.view_of(epoch, ids))

    def view_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """int64 ``[B]``: which view of each sample an epoch shows; over K epochs every one of K once."""
        if not self.train:
            return np.zeros_like(ids)
        if self.views is None:
            return np.full_like(ids, epoch)
        # Offset by sample: a batch mixes all K views, so that its statistics are not those of one of them.
        offset = hash64(_VIEW_OF, ids) % np.uint64(self.views)
        return (np.int64(epoch) + offset.astype(np.int64)) % np.int64(self.views)
