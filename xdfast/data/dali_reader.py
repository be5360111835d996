"""``DaliReader``: the same batches as :class:`BatchReader`, JPEGs decoded by DALI, on the CPU or a GPU.

Pillow stays the judge. It reads every header, so files that are no images are found before DALI sees them. What DALI would
decode otherwise or no faster, and every JPEG whose structure is not plain and whole (:func:`is_plain_jpeg`), is decoded by
Pillow, in threads. That matters: an error inside DALI 2.4 ends its pipeline without naming the file, and with some 30 images
in a batch often the process (segmentation fault, other images still being decoded). Should it raise all the same, Pillow
finds the culprits, they are replaced, and the same batch is made again. What remains different: wrong values inside a
JPEG's scan, over which DALI passes in silence (``xdfast data check --full`` finds what Pillow notices of them).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xdfast.data.batches import PADDING, BatchPlan
from xdfast.data.crops import Crop
from xdfast.data.dali import DaliDecoder, DaliError, DaliRenderer
from xdfast.data.decode import BadImage, decode, open_image
from xdfast.data.jpeg import is_plain_jpeg
from xdfast.data.reader import Batch, candidates, make_batch, no_replacement
from xdfast.data.sources import ImageSource
from xdfast.data.views import Views

__all__ = ["DaliReader"]

log = logging.getLogger("xdfast")


@dataclass
class _Item:
    """One row: a file, its crop if DALI is to decode it, else its base [S, S, 3]."""

    image: int
    data: bytes
    digest: int
    crop: Crop | None = None
    base: np.ndarray | None = None


@dataclass
class _Draft:
    """A batch in the making."""

    plan: BatchPlan
    queues: dict[int, Iterator[int]]  # row → images to try
    items: dict[int, _Item] = field(default_factory=dict)  # row → what was found
    bad: dict[str, str] = field(default_factory=dict)  # path → reason

    def who(self, row: int) -> tuple[int, int]:
        """(view, slot) of a row."""
        return int(self.plan.views[row]), int(self.plan.ids[row])


class DaliReader:
    """Maps a :class:`BatchPlan` to a :class:`Batch`; called from one thread at a time.

    Args:
        source: images; ``source.encoded``.
        views: what to make of them; no ``auto_augment`` (its draws come from global generators, which belong to the
            training thread).
        batch_size: of the plans.
        threads: for reading, and as many for DALI.
        device: None, or the number of a GPU that decodes; see :class:`DaliRenderer`.
        digests: fills :attr:`Batch.digests`.
    """

    def __init__(
        self, source: ImageSource, views: Views, batch_size: int, threads: int, device: int | None, digests: bool
    ) -> None:
        self.source = source
        self.views = views
        self.digests = digests
        self._labels = np.asarray(source.labels, dtype=np.int64)
        # Shifted ('pad') images are coloured after the shift: the black border belongs to the mean that contrast keeps.
        self._jitter = views.coloured and views.augment.train_crop != "pad"
        size, interpolation = views.image_size, views.augment.interpolation
        self._dali: DaliDecoder | DaliRenderer = DaliDecoder(batch_size, threads)
        if device is not None:
            self._dali = DaliRenderer(batch_size, size, interpolation, threads, device, self._jitter)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="xdfast-read")
        self._by_pillow: set[int] = set()  # images that Pillow can decode and DALI cannot

    def __getitem__(self, plan: BatchPlan) -> Batch:
        valid = plan.ids != PADDING
        ids = plan.ids.copy()
        digests = np.zeros(len(ids), dtype=np.int64)
        rows = [int(row) for row in np.flatnonzero(valid)]
        draft = _Draft(plan, {})
        draft.queues = {row: candidates(self.source, self.views, *draft.who(row)) for row in rows}
        self._fill(draft, rows)
        bases = self._render(draft)
        for row, item in draft.items.items():
            ids[row], digests[row] = item.image, item.digest
        for row in rows:
            valid[row] = row in draft.items
        images = self.views.finish(bases.permute(0, 3, 1, 2), plan.views, plan.ids, coloured=self._jitter)
        return make_batch(images, self._labels, plan, ids, valid, digests, draft.bad)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._dali.close()

    def _fill(self, draft: _Draft, rows: list[int]) -> None:
        """Reads an image for each row; one that cannot be read is replaced, or in evaluation left out."""
        firsts: dict[int, BadImage] = {}
        while rows:
            chosen: dict[int, int] = {}
            for row in rows:
                image = next(draft.queues[row], None)
                if image is not None:
                    chosen[row] = image
                elif self.views.train:
                    raise no_replacement(self.source, firsts.get(row))
            found = list(self._pool.map(self._item, chosen.values(), [draft.who(row) for row in chosen]))
            rows = []
            for row, item in zip(chosen, found, strict=True):
                if isinstance(item, BadImage):
                    draft.bad[item.path] = item.reason
                    firsts.setdefault(row, item)
                    rows.append(row)
                else:
                    draft.items[row] = item

    def _item(self, image: int, who: tuple[int, int]) -> _Item | BadImage:
        try:
            path = self.source.path(image)
            data = self.source.read(image)
            if data is None:
                raise BadImage(path, "the source has no file for it")
            item = _Item(image, data, zlib.crc32(data) if self.digests else 0)
            opened = open_image(data, path)
            if opened.mode in ("L", "RGB") and is_plain_jpeg(data) and image not in self._by_pillow:
                item.crop = self.views.crop(*who, *opened.size)
            else:
                item.base = self._base(decode(data, path), who)
            return item
        except BadImage as error:
            return error

    def _base(self, image: Image.Image, who: tuple[int, int]) -> np.ndarray:
        return self._colour(self.views.base(image, *who), who)

    def _colour(self, base: np.ndarray, who: tuple[int, int]) -> np.ndarray:
        return np.array(self.views.colour(Image.fromarray(base), *who)) if self._jitter else base

    def _render(self, draft: _Draft) -> Tensor:
        """uint8 ``[B, S, S, 3]``, black where a row has no image; after a failure of DALI what remains is tried again."""
        while True:
            rows = sorted(row for row, item in draft.items.items() if item.crop is not None)
            try:
                views = self._run_dali(draft, rows)
                break
            except DaliError as error:
                self._quarantine(draft, rows, error)
        count, size = len(draft.plan.ids), self.views.image_size
        if isinstance(views, Tensor) and len(rows) == count:
            return views  # all of them, where they are
        on = views.device if isinstance(views, Tensor) else None
        black = len(draft.items) < count  # rows without an image
        bases = (torch.zeros if black else torch.empty)((count, size, size, 3), dtype=torch.uint8, device=on)
        if isinstance(views, Tensor):
            bases[torch.tensor(rows, dtype=torch.int64, device=on)] = views
        else:
            out = bases.numpy()

            def resample(row: int, pixels: np.ndarray) -> None:
                crop = draft.items[row].crop
                if crop is not None:
                    self.views.resample(pixels, crop, out[row])
                    if self._jitter:
                        out[row] = self._colour(out[row], draft.who(row))

            list(self._pool.map(resample, rows, views))
        for row, item in draft.items.items():
            if item.base is not None:
                bases[row] = torch.from_numpy(item.base)
        return bases

    def _run_dali(self, draft: _Draft, rows: list[int]) -> list[np.ndarray] | Tensor:
        """What DALI makes of some rows: decoded crops (CPU) or whole views (GPU).

        Raises:
            DaliError: it cannot decode one of them.
        """
        if not rows:
            return []
        data = [draft.items[row].data for row in rows]
        crops = [crop for row in rows if (crop := draft.items[row].crop)]
        if isinstance(self._dali, DaliDecoder):
            return self._dali(data, crops)
        jitters = [self.views.jitter(*draft.who(row)) if self._jitter else [] for row in rows]
        return self._dali(data, crops, jitters)

    def _quarantine(self, draft: _Draft, rows: list[int], error: DaliError) -> None:
        """Takes the images on which DALI failed out of its hands. At least one, so that this ends."""
        log.info("DALI failed on a batch of %d images; looking for the one", len(rows))

        def check(row: int) -> BadImage | None:
            item = draft.items[row]
            try:
                decode(item.data, self.source.path(item.image))
                return None
            except BadImage as broken:
                return broken

        broken = {row: found for row, found in zip(rows, self._pool.map(check, rows), strict=True) if found}
        for row, found in broken.items():
            draft.bad[found.path] = found.reason
            del draft.items[row]
        if broken:
            self._fill(draft, list(broken))
            return
        culprits = self._bisect(draft, rows)
        if not culprits:
            raise error  # alone, every one of them decodes: nothing here is to blame, and trying again would not end
        for row in culprits:
            item = draft.items[row]
            self._by_pillow.add(item.image)
            log.warning("DALI cannot decode %s, Pillow can and does from now on", self.source.path(item.image))
            item.crop, item.base = None, self._base(decode(item.data, self.source.path(item.image)), draft.who(row))

    def _bisect(self, draft: _Draft, rows: list[int]) -> list[int]:
        """The rows that DALI cannot decode, even alone."""
        try:
            self._run_dali(draft, rows)
            return []
        except DaliError:
            if len(rows) == 1:
                return rows
        half = len(rows) // 2
        return self._bisect(draft, rows[:half]) + self._bisect(draft, rows[half:])
