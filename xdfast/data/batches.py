"""Which images make which batch: a function of (seed, epoch, rank), with no state to save."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    gets the same number of batches. In training the last, incomplete batch is dropped (``drop_last``), filled up to equal
    parts from the start of the order, or, with ``exact``, dealt as it is; in evaluation every image comes once and shorter
    parts are filled with :data:`PADDING`.

    ``exact``: every image once per epoch. Batch statistics (BatchNorm, RSD) need two rows, so of a last batch of r rows the
    first min(W, r // 2) ranks get two or more each and the others none (with ``batch_size=1`` the first r ranks get one
    each); and a last batch of a single row is joined to the batch before it. A rank's batch is then longer than
    ``batch_size`` by at most one (:attr:`max_rows`). Which images a batch of all ranks holds depends on
    ``batch_size · world_size`` alone.

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
        repeats: R, repeated augmentation (Hoffer et al., "Augment your batch", CVPR 2020): R views of an image in a row, so in one
            batch of all ranks. An epoch has as many batches as without and shows N / R of the images.
        exact: in training, every image exactly once per epoch; takes the place of ``drop_last``.

    Attributes:
        batches_per_epoch: the same on every rank.
        max_rows: of the largest batch of any rank.

    Raises:
        ValueError: fewer images than processes in training (``exact``: fewer than two), or a value out of range.
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
        exact: bool = False,
        repeats: int = 1,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("repeats", repeats),
            ("views", 1 if views is None else views),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank!r}")
        if count < 1:
            raise ValueError("the source has no images")
        if repeats > 1 and (exact or views is not None):
            raise ValueError(
                f"repeats={repeats} shows some images several times in an epoch, in new views: neither every image exactly once "
                "nor fixed views can go with it"
            )
        self.repeats = repeats if train else 1
        exact = exact and train
        if exact and count < 2:
            raise ValueError("one training image makes no batch for exact tails; give at least 2")
        if train and not exact and count < world_size:
            raise ValueError(
                f"{count} training images cannot be shared by {world_size} processes; use at most {count} processes"
            )
        drop_last = not exact and (train if drop_last is None else drop_last)
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
        self.exact = exact
        whole = batch_size * world_size
        self.batches_per_epoch = max(1, count // whole) if drop_last else -(-count // whole)
        # A single row left over has no batch of its own: it joins the one before.
        self._joined = exact and count % whole == 1 and count > whole
        self.batches_per_epoch -= self._joined
        self.max_rows = batch_size + exact

    def order(self, epoch: int) -> np.ndarray:
        """int64 ``[N]``: the order of an epoch, the same on every rank."""
        ids = np.arange(self.count, dtype=np.int64)
        if not self.train:
            return ids
        return np.argsort(hash64(self.seed, _ORDER, epoch, ids), kind="stable")

    def batches(self, epoch: int, start: int) -> Iterator[BatchPlan]:
        """The batches of an epoch from number ``start`` on; with ``exact`` the last one may be empty on this rank."""
        order = self.order(epoch)
        if self.repeats > 1:
            order = np.repeat(order[: -(-self.count // self.repeats)], self.repeats)[: self.count]
        turns = np.arange(self.count, dtype=np.int64) % self.repeats  # which copy of its image a place of the order is
        for number in range(start, self.batches_per_epoch):
            piece, turn = self._piece(order, number), self._piece(turns, number)
            sharing = self._sharing(len(piece))
            missing = 0 if self.exact else -len(piece) % self.world_size
            if missing:
                filler = order[:missing] if self.train else np.full(missing, PADDING, dtype=np.int64)
                piece, turn = np.concatenate((piece, filler)), np.concatenate((turn, turns[:missing]))
            mine = slice(self.rank, None, sharing) if self.rank < sharing else slice(0)
            ids = piece[mine]
            yield BatchPlan(ids, self.view_of(epoch, ids) if self.repeats == 1 else epoch * self.repeats + turn[mine])

    def rows(self, number: int) -> int:
        """Rows of batch ``number`` on all ranks together; filling counts."""
        rows = len(self._piece(range(self.count), number))
        return rows if self.exact else rows + -rows % self.world_size

    def _piece(self, order: Any, number: int) -> Any:
        whole = self.batch_size * self.world_size
        last = self._joined and number == self.batches_per_epoch - 1
        return order[number * whole : None if last else (number + 1) * whole]

    def _sharing(self, rows: int) -> int:
        """How many ranks, from the first on, get something of a batch."""
        if not self.exact:
            return self.world_size
        return min(self.world_size, rows // min(2, self.batch_size))

    def view_of(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """int64 ``[B]``: which view of each sample an epoch shows; over K epochs every one of K once."""
        if not self.train:
            return np.zeros_like(ids)
        if self.views is None:
            return np.full_like(ids, epoch)
        # Offset by sample: a batch mixes all K views, so that its statistics are not those of one of them.
        offset = hash64(_VIEW_OF, ids) % np.uint64(self.views)
        return (np.int64(epoch) + offset.astype(np.int64)) % np.int64(self.views)
