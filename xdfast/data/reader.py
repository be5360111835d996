"""From a planned batch to tensors; runs in this process or in a worker, with the same result."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xdfast.data._rng import hash_int, preserved_rng
from xdfast.data.batches import PADDING, BatchPlan
from xdfast.data.decode import BadImage, decode
from xdfast.data.sources import ImageSource
from xdfast.data.views import Views

__all__ = ["Batch", "BatchReader", "candidates", "load_image"]

_REPLACE = 0x5245504C
_TRIES = 100
_CACHE_BYTES = 512 * 2**20
PADDING_LABEL = -100  # ignore_index of torch's cross_entropy


@dataclass
class Batch:
    """Images of one step.

    Attributes:
        images: uint8 ``[B, 3, S, S]``, 0..255, not normalised, channels last in memory.
        labels: int64 ``[B]``.
        ids: int64 ``[B]`` positions in the source of the images.
        valid: bool ``[B]``; False only in evaluation: an unreadable image (black; its own id and label), or filling
            where a rank has no image left (id -1, label -100).
        slots: int64 ``[B]`` the samples the rows stand for: ``ids``, but for rows in which another image replaces an
            unreadable one. Views are drawn from them.
        views: int64 ``[B]`` view index of each row.
        digests: int64 ``[B]`` crc32 of the image files (of the pixels, where there is no file); 0 unless asked for.
        bad: path → reason of the images of this batch that could not be read.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    valid: Tensor
    slots: Tensor
    views: Tensor
    digests: Tensor
    bad: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """Copy in page-locked memory; called by torch's DataLoader."""
        pinned: dict[str, Any] = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**pinned)


class BatchReader(torch.utils.data.Dataset):
    """Maps a :class:`BatchPlan` to a :class:`Batch`, decoding with Pillow.

    Args:
        source: images.
        views: what to make of them.
        cache: keeps fixed bases in memory; for sources in memory, read in one process.
        digests: fills :attr:`Batch.digests`.
    """

    def __init__(self, source: ImageSource, views: Views, cache: bool, digests: bool = False) -> None:
        self.source = source
        self.views = views
        self.digests = digests
        self._labels = np.asarray(source.labels, dtype=np.int64)
        size = views.image_size
        self._bases: Tensor | None = None
        if cache and source.in_memory and views.fixed_base and len(source) * 3 * size * size <= _CACHE_BYTES:
            self._bases = torch.empty((len(source), size, size, 3), dtype=torch.uint8)
            self._have = np.zeros(len(source), dtype=bool)
            self._digests = np.zeros(len(source), dtype=np.int64)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        # A view is drawn from the id of the sample the row stands for, also where another image replaces it.
        slots, size = plan.ids, self.views.image_size
        ids = slots.copy()
        valid = slots != PADDING
        digests = np.zeros(len(slots), dtype=np.int64)
        bad: dict[str, str] = {}
        with preserved_rng():
            if self._bases is not None and valid.all() and self._have[slots].all():
                bases, digests = self._bases[torch.from_numpy(slots)], self._digests[slots]
            else:
                bases = torch.zeros((len(slots), size, size, 3), dtype=torch.uint8)
                for row in np.flatnonzero(valid):
                    found = self._read(int(plan.views[row]), int(slots[row]), bases[row], bad)
                    valid[row] = found is not None
                    ids[row], digests[row] = (slots[row], 0) if found is None else found
            images = self.views.finish(bases.permute(0, 3, 1, 2), plan.views, slots)
        return make_batch(images, self._labels, plan, ids, valid, digests, bad)

    def _read(self, view: int, slot: int, out: Tensor, bad: dict[str, str]) -> tuple[int, int] | None:
        """Fills ``out`` uint8 ``[S, S, 3]`` and returns the id of the image in it and its digest.

        In training an unreadable image is replaced by another one, chosen by (seed, view, id) alone; in evaluation the
        answer is then None. What was unreadable is added to ``bad``.

        Raises:
            RuntimeError: no replacement could be read either.
        """
        first: BadImage | None = None
        for candidate in candidates(self.source, self.views, view, slot):
            try:
                return candidate, self._base(view, slot, candidate, out)
            except BadImage as error:
                bad[error.path] = error.reason
                first = first or error
        if not self.views.train:
            return None
        raise no_replacement(self.source, first)

    def _base(self, view: int, slot: int, i: int, out: Tensor) -> int:
        if self._bases is not None and self._have[i]:
            out.copy_(self._bases[i])
            return int(self._digests[i])
        self.views.reseed(view, slot)  # before load(): a dataset of the user's may draw at random too
        image, digest = load_image(self.source, i, self.digests)
        self.views.base(image, view, slot, out.numpy())
        if self._bases is not None:
            self._bases[i], self._have[i], self._digests[i] = out, True, digest
        return digest


def load_image(source: ImageSource, i: int, digest: bool = False) -> tuple[Image.Image, int]:
    """Image ``i``, and, if asked for, the crc32 of its file (of its pixels, where there is no file), else 0.

    Raises:
        BadImage: it cannot be read.
    """
    if not digest:
        return source.load(i), 0
    data = source.read(i)
    if data is None:
        image = source.load(i)
        return image, zlib.crc32(image.tobytes())
    return decode(data, source.path(i)), zlib.crc32(data)


def candidates(source: ImageSource, views: Views, view: int, slot: int) -> Iterator[int]:
    """The image of a sample, then, in training, those to try in its place where it cannot be read."""
    yield slot
    if not views.train:
        return
    # A walk through all images in steps that share no factor with their number: small sets are tried to the last image.
    count = len(source)
    start, step = (hash_int(views.seed, _REPLACE, view, slot, salt) % count for salt in (0, 1))
    while math.gcd(step, count) != 1:
        step += 1
    for k in range(min(_TRIES, count)):
        candidate = (start + k * step) % count
        if candidate != slot:
            yield candidate


def no_replacement(source: ImageSource, first: BadImage | None) -> RuntimeError:
    """The error where neither a sample nor what was drawn to replace it can be read."""
    return RuntimeError(
        f"{first}; none of {min(_TRIES, len(source))} images drawn to replace it can be read either: check {source.name}"
    )


def make_batch(
    images: Tensor,
    labels: np.ndarray,
    plan: BatchPlan,
    ids: np.ndarray,
    valid: np.ndarray,
    digests: np.ndarray,
    bad: dict[str, str],
) -> Batch:
    """A :class:`Batch` of what a reader found; ``labels`` are those of the whole source."""
    vectors = {
        "labels": np.where(ids == PADDING, PADDING_LABEL, labels[ids]),
        "ids": ids,
        "valid": valid,
        "slots": plan.ids,
        "views": plan.views,
        "digests": digests,
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in vectors.items()}
    return Batch(images=images, bad=bad, **tensors)
