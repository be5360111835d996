"""From a planned batch to tensors; runs in this process or in a worker, with the same result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdfast.data._rng import hash_int, preserved_rng
from xdfast.data.batches import PADDING, BatchPlan
from xdfast.data.decode import BadImage
from xdfast.data.sources import ImageSource
from xdfast.data.views import Views

__all__ = ["Batch", "BatchReader"]

_REPLACE = 0x5245504C
_TRIES = 100
_CACHE_BYTES = 512 * 2**20
PADDING_LABEL = -100  # ignore_index of torch's cross_entropy


@dataclass
class Batch:
    """Images of one step.

    Attributes:
        images: uint8 ``[B, 3, S, S]``, 0..255, not normalised.
        labels: int64 ``[B]``.
        ids: int64 ``[B]`` positions in the source.
        valid: bool ``[B]``; False only in evaluation: an unreadable image (black; its own id and label), or filling
            where a rank has no image left (id -1, label -100).
        bad: path → reason of the images of this batch that could not be read.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    valid: Tensor
    bad: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """Copy in page-locked memory; called by torch's DataLoader."""
        images, labels, ids, valid = (t.pin_memory() for t in (self.images, self.labels, self.ids, self.valid))
        return Batch(images, labels, ids, valid, self.bad)


class BatchReader(torch.utils.data.Dataset):
    """Maps a :class:`BatchPlan` to a :class:`Batch`.

    Args:
        source: images.
        views: what to make of them.
        cache: keeps fixed bases in memory; for sources in memory, read in one process.
    """

    def __init__(self, source: ImageSource, views: Views, cache: bool) -> None:
        self.source = source
        self.views = views
        self._labels = np.asarray(source.labels, dtype=np.int64)
        size = views.image_size
        self._bases: Tensor | None = None
        if cache and source.in_memory and views.fixed_base and len(source) * 3 * size * size <= _CACHE_BYTES:
            self._bases = torch.empty((len(source), 3, size, size), dtype=torch.uint8)
            self._have = np.zeros(len(source), dtype=bool)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        slots = (
            plan.ids
        )  # a view is drawn from the id of the sample the row stands for, also where another image replaces it
        ids = slots.copy()
        valid = slots != PADDING
        bad: dict[str, str] = {}
        epoch = plan.epoch if self.views.train else 0  # evaluation is the same in every epoch
        with preserved_rng():
            if self._bases is not None and valid.all() and self._have[slots].all():
                bases = self._bases[torch.from_numpy(slots)]
            else:
                size = self.views.image_size
                bases = torch.zeros((len(slots), 3, size, size), dtype=torch.uint8)
                for row in np.flatnonzero(valid):
                    found = self._read(epoch, int(slots[row]), bases[row], bad)
                    valid[row] = found is not None
                    ids[row] = slots[row] if found is None else found
            images = self.views.finish(bases, epoch, slots)
        labels = np.where(ids == PADDING, PADDING_LABEL, self._labels[ids])
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(ids), torch.from_numpy(valid), bad)

    def _read(self, epoch: int, slot: int, out: Tensor, bad: dict[str, str]) -> int | None:
        """Fills ``out`` uint8 ``[3, S, S]`` and returns the id of the image in it.

        In training an unreadable image is replaced by another one, chosen by (seed, epoch, id) alone; in evaluation the
        answer is then None. What was unreadable is added to ``bad``.

        Raises:
            RuntimeError: no replacement could be read either.
        """
        first: BadImage | None = None
        for candidate in self._candidates(epoch, slot):
            try:
                out.copy_(self._base(epoch, slot, candidate))
                return candidate
            except BadImage as error:
                bad[error.path] = error.reason
                first = first or error
        if not self.views.train:
            return None
        raise RuntimeError(
            f"{first}; none of {min(_TRIES, len(self.source))} images drawn to replace it can be read either: "
            f"check {self.source.name}"
        )

    def _candidates(self, epoch: int, slot: int) -> Iterator[int]:
        yield slot
        if not self.views.train:
            return
        # A walk through all images in steps that share no factor with their number: small sets are tried to the last image.
        count = len(self.source)
        start, step = (hash_int(self.views.seed, _REPLACE, epoch, slot, salt) % count for salt in (0, 1))
        while math.gcd(step, count) != 1:
            step += 1
        for k in range(min(_TRIES, count)):
            candidate = (start + k * step) % count
            if candidate != slot:
                yield candidate

    def _base(self, epoch: int, slot: int, i: int) -> Tensor:
        if self._bases is not None and self._have[i]:
            return self._bases[i]
        self.views.reseed(epoch, slot)  # before load(): a dataset of the user's may draw at random too
        base = self.views.base(self.source.load(i))
        if self._bases is not None:
            self._bases[i], self._have[i] = base, True
        return base
