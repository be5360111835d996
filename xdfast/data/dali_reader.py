"""``DaliReader``: the same batches as :class:`BatchReader`, JPEGs decoded by DALI, on the CPU or a GPU.

Pillow stays the judge. A file's header is read by it, so unreadable files are found before DALI sees them. What DALI would
decode otherwise, or no faster (anything but 8-bit grey and RGB JPEGs, and JPEGs without an end marker, of which DALI's
region decoder notices nothing), is decoded by Pillow, in threads. Where DALI fails on a batch, Pillow finds the culprits,
they are replaced, and the same batch is made again. What remains different: a JPEG damaged in the middle, over which DALI
passes in silence (``xdfast data check --full`` finds what Pillow notices of it).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xdfast.data.batches import PADDING, BatchPlan
from xdfast.data.crops import Crop
from xdfast.data.dali import DaliDecoder, DaliError, DaliRenderer
from xdfast.data.decode import BadImage, decode, open_image
from xdfast.data.reader import Batch, candidates, make_batch, no_replacement
from xdfast.data.sources import ImageSource
from xdfast.data.views import Views

__all__ = ["DaliReader"]

log = logging.getLogger("xdfast")

_END_OF_IMAGE = b"\xff\xd9"


@dataclass
class _Item:
    """One row: a file, its crop if DALI is to decode it, else its base [S, S, 3]."""

    image: int
    data: bytes
    digest: int
    crop: Crop | None = None
    base: np.ndarray | None = None


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
        self._decoder = DaliDecoder(batch_size, threads) if device is None else None
        self._renderer = (
            None
            if device is None
            else DaliRenderer(batch_size, views.image_size, views.augment.interpolation, threads, device, self._jitter)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="xdfast-read")
        self._by_pillow: set[int] = set()  # images that Pillow can decode and DALI cannot

    def __getitem__(self, plan: BatchPlan) -> Batch:
        valid = plan.ids != PADDING
        ids = plan.ids.copy()
        digests = np.zeros(len(ids), dtype=np.int64)
        bad: dict[str, str] = {}
        rows = [int(row) for row in np.flatnonzero(valid)]
        queues = {row: candidates(self.source, self.views, int(plan.views[row]), int(plan.ids[row])) for row in rows}
        items: dict[int, _Item] = {}
        self._fill(items, rows, queues, plan, bad)
        bases = self._render(items, queues, plan, bad)
        for row, item in items.items():
            ids[row], digests[row] = item.image, item.digest
        for row in rows:
            valid[row] = row in items
        images = self.views.finish(bases.permute(0, 3, 1, 2), plan.views, plan.ids, coloured=self._jitter)
        return make_batch(images, self._labels, plan, ids, valid, digests, bad)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for graph in (self._decoder, self._renderer):
            if graph is not None:
                graph.close()

    def _fill(
        self,
        items: dict[int, _Item],
        rows: list[int],
        queues: dict[int, Iterator[int]],
        plan: BatchPlan,
        bad: dict[str, str],
    ) -> None:
        """Reads an image for each row; one that cannot be read is replaced, or in evaluation left out."""
        firsts: dict[int, BadImage] = {}
        while rows:
            chosen: dict[int, int] = {}
            for row in rows:
                image = next(queues[row], None)
                if image is not None:
                    chosen[row] = image
                elif self.views.train:
                    raise no_replacement(self.source, firsts.get(row))
            found = list(self._pool.map(self._item, chosen, chosen.values(), [plan] * len(chosen)))
            rows = []
            for row, item in zip(chosen, found, strict=True):
                if isinstance(item, BadImage):
                    bad[item.path] = item.reason
                    firsts.setdefault(row, item)
                    rows.append(row)
                else:
                    items[row] = item

    def _item(self, row: int, image: int, plan: BatchPlan) -> _Item | BadImage:
        view, slot = int(plan.views[row]), int(plan.ids[row])
        try:
            path = self.source.path(image)
            data = self.source.read(image)
            if data is None:
                raise BadImage(path, "the source has no file for it")
            item = _Item(image, data, zlib.crc32(data) if self.digests else 0)
            opened = open_image(data, path)
            plain = opened.format == "JPEG" and opened.mode in ("L", "RGB") and data.endswith(_END_OF_IMAGE)
            if plain and image not in self._by_pillow:
                item.crop = self.views.crop(view, slot, *opened.size)
            else:
                item.base = self._base(decode(data, path), plan, row)
            return item
        except BadImage as error:
            return error

    def _base(self, image: Image.Image, plan: BatchPlan, row: int) -> np.ndarray:
        view, slot = int(plan.views[row]), int(plan.ids[row])
        return self._colour(self.views.base(image, view, slot), view, slot)

    def _colour(self, base: np.ndarray, view: int, slot: int) -> np.ndarray:
        return np.asarray(self.views.colour(Image.fromarray(base), view, slot)) if self._jitter else base

    def _render(
        self, items: dict[int, _Item], queues: dict[int, Iterator[int]], plan: BatchPlan, bad: dict[str, str]
    ) -> Tensor:
        """uint8 ``[B, S, S, 3]``, black where a row has no image; after a failure of DALI what remains is tried again."""
        while True:
            rows = [row for row, item in items.items() if item.crop is not None]
            try:
                views = self._dali(items, rows, plan)
                break
            except DaliError as error:
                self._quarantine(items, rows, queues, plan, bad, error)
        if isinstance(views, Tensor) and len(rows) == len(plan.ids):
            return views  # all of them, in order, where they are
        size, on = self.views.image_size, views.device if isinstance(views, Tensor) else None
        black = len(items) < len(plan.ids)  # rows without an image
        bases = (torch.zeros if black else torch.empty)((len(plan.ids), size, size, 3), dtype=torch.uint8, device=on)
        if isinstance(views, Tensor):
            bases[torch.tensor(rows, dtype=torch.int64, device=on)] = views
        else:
            out = bases.numpy()

            def resample(row: int, pixels: np.ndarray) -> None:
                crop = items[row].crop
                if crop is not None:
                    self.views.resample(pixels, crop, out[row])
                    if self._jitter:
                        out[row] = self._colour(out[row], int(plan.views[row]), int(plan.ids[row]))

            list(self._pool.map(resample, rows, views))
        for row, item in items.items():
            if item.base is not None:
                bases[row] = torch.from_numpy(np.array(item.base))
        return bases

    def _dali(self, items: dict[int, _Item], rows: list[int], plan: BatchPlan) -> list[np.ndarray] | Tensor:
        """What DALI makes of some rows: decoded crops (CPU) or whole views (GPU).

        Raises:
            DaliError: it cannot decode one of them.
        """
        if not rows:
            return []
        data, crops = [items[row].data for row in rows], [crop for row in rows if (crop := items[row].crop)]
        if self._renderer is None:
            assert self._decoder is not None
            return self._decoder(data, crops)
        jitters = [self.views.jitter(int(plan.views[r]), int(plan.ids[r])) if self._jitter else [] for r in rows]
        return self._renderer(data, crops, jitters)

    def _quarantine(
        self,
        items: dict[int, _Item],
        rows: list[int],
        queues: dict[int, Iterator[int]],
        plan: BatchPlan,
        bad: dict[str, str],
        error: DaliError,
    ) -> None:
        """Takes the images on which DALI failed out of its hands. At least one, so that this ends."""
        log.info("DALI failed on a batch of %d images; looking for the one", len(rows))

        def check(row: int) -> BadImage | None:
            try:
                decode(items[row].data, self.source.path(items[row].image))
                return None
            except BadImage as broken:
                return broken

        broken = {row: found for row, found in zip(rows, self._pool.map(check, rows), strict=True) if found}
        for row, found in broken.items():
            bad[found.path] = found.reason
            del items[row]
        if broken:
            self._fill(items, list(broken), queues, plan, bad)
            return
        culprits = self._bisect(items, rows, plan)
        if not culprits:
            raise error  # alone, every one of them decodes: nothing here is to blame, and trying again would not end
        for row in culprits:
            item = items[row]
            self._by_pillow.add(item.image)
            log.warning("DALI cannot decode %s, Pillow can and does from now on", self.source.path(item.image))
            item.crop, item.base = None, self._base(decode(item.data, self.source.path(item.image)), plan, row)

    def _bisect(self, items: dict[int, _Item], rows: list[int], plan: BatchPlan) -> list[int]:
        try:
            self._dali(items, rows, plan)
            return []
        except DaliError:
            if len(rows) == 1:
                return rows
        half = len(rows) // 2
        return self._bisect(items, rows[:half], plan) + self._bisect(items, rows[half:], plan)
