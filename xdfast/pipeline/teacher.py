"""What the teacher says about a batch: computed, or read from the store that an earlier pass filled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast import distributed
from xdfast.data import Batch, ImageLoader, ImageSource
from xdfast.data._rng import preserved_rng
from xdfast.data.batches import BatchPlan
from xdfast.data.store import CHANGED, HIT, TeacherStore
from xdfast.models import FeatureModel, ModelOutput, pool_tap, tap_widths
from xdfast.nn import to_grid
from xdfast.pipeline.journal import ProgressLine

__all__ = ["CachedTeacher", "LiveTeacher", "cache_root", "open_store", "stores"]

log = logging.getLogger("xdfast")

_NAMED = 3
_TAP = "tap:"
_MAP = re.compile(r"map(\d+):(.+)")


class LiveTeacher:
    """Runs the teacher on every batch.

    Args:
        net: the frozen model.
        kinds: of ``"features"``, ``"logits"``, ``"tap:MODULE"`` (mean over places) and ``"mapG:MODULE"`` (mean in each of G × G
            parts of the picture, ``[B, D · G · G]``).
    """

    def __init__(self, net: FeatureModel, kinds: tuple[str, ...]) -> None:
        self.net = net
        self.kinds = kinds

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first batch of an epoch, on every rank."""

    def targets(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """``{"features": [B, D], "logits": [B, C], "tap:MODULE": [B, D], …}`` in float32, those of ``kinds``, where the images are.

        Args:
            images: float ``[B, 3, S, S]`` in [0, 1].
            batch: what they are.
        """
        return _outputs(self.net, images, self.kinds)

    def close(self) -> None:
        """Nothing to close."""


class CachedTeacher:
    """Reads what the store has; runs the teacher on batches with something missing, and stores what it says.

    A stored value is rounded to the store's dtype. So is a computed one before it is used: a run that was interrupted, or
    that finds the store filled, sees the same numbers as the one that filled it.

    When nothing is missing any more, the teacher is let go; should an image file have changed after that, it is loaded
    again.

    Args:
        store: see :func:`open_store`.
        load: makes the frozen model on its device; called when it is needed.
        loader: of the training views, with ``fixed_views`` and ``digests``.
        kinds: outputs to give.
        net: the teacher, where it is loaded already.
        progress: a bar for the rest of rows.
    """

    def __init__(
        self,
        store: TeacherStore,
        load: Callable[[], FeatureModel],
        loader: ImageLoader,
        kinds: tuple[str, ...],
        *,
        net: FeatureModel | None = None,
        progress: bool = True,
    ) -> None:
        self.store = store
        self.kinds = kinds
        self._computed = self._read = 0
        self._load, self._loader, self._progress = load, loader, progress
        self._net = net
        self._changed: set[str] = set()
        loader.watch = self.fetch_ahead

    def begin_epoch(self, epoch: int) -> None:
        """After K epochs computes the views that incomplete last batches left out; then lets the teacher go."""
        distributed.barrier()  # what the ranks wrote is there
        if epoch >= self.store.layout.views and distributed.any_rank(not self.store.complete):
            self.fill()
        if self._net is not None and self.store.complete:
            self._net = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.info("the teacher cache is complete (%s); the teacher is unloaded", self.store.folder)

    def targets(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As :meth:`LiveTeacher.targets`; rows of a batch in which all are stored are read, else all are computed."""
        slots, views, digests = batch.slots.numpy(), batch.views.numpy(), batch.digests.numpy()
        stored, status = self.store.read(slots, views, digests)
        if (status == HIT).all():
            self._read += len(status)
            return {kind: stored[kind].to(images.device, non_blocking=True) for kind in self.kinds}
        for row in np.flatnonzero(status == CHANGED):
            self._tell_changed(int(batch.ids[row]))
        computed = self._compute(images)
        # A row can come twice in a batch (filled up from the start of the order); the store takes it once.
        first = np.unique(np.stack([slots, views]), axis=1, return_index=True)[1]
        new = first[status[first] != HIT]
        index = torch.from_numpy(new)
        on_host = {kind: value.cpu() for kind, value in computed.items()}
        self.store.write(slots[new], views[new], digests[new], {k: v[index] for k, v in on_host.items()})
        self._computed += len(status)
        return {kind: self._rounded(value) for kind, value in computed.items()}

    def fill(self) -> int:
        """Computes every row that is missing, shared by the ranks; returns how many this one did."""
        ids, views = self.store.missing()
        # By id, not by place in the list: a rank that looks later, or through a network file system, sees another list.
        mine = ids % distributed.world_size() == distributed.rank()
        ids, views = ids[mine], views[mine]
        size = self._loader.batch_size
        plans = [BatchPlan(ids[i : i + size], views[i : i + size]) for i in range(0, len(ids), size)]
        line = ProgressLine("teacher cache", len(plans), enabled=self._progress and distributed.is_main())
        try:
            with torch.no_grad():
                for number, batch in enumerate(self._loader.read(plans), 1):
                    device = next(self._teacher().net.parameters()).device
                    self.targets(batch.images.to(device).float().div_(255), batch)
                    line.update(number, f"{self.store.count:,} of {self.store.total:,} rows")
        finally:
            line.close()
            self.store.flush()
        distributed.barrier()
        return len(ids)

    def fetch_ahead(self, plan: BatchPlan) -> None:
        """Has the rows of a batch read while others are worked on."""
        # Rows lie all over the store: from a cold disk a batch takes 37 ms, asked for a batch ahead 1.4.
        self.store.prefetch(plan.ids, plan.views)

    def close(self) -> None:
        """Brings everything to the disk."""
        self._loader.watch = None
        self.store.close()
        log.info("teacher cache: %s rows read, %s computed in this session", f"{self._read:,}", f"{self._computed:,}")

    def _compute(self, images: Tensor) -> dict[str, Tensor]:
        return _outputs(self._teacher(), images, self.kinds)

    def _teacher(self) -> FeatureModel:
        if self._net is None:
            with preserved_rng(torch.device("cuda") if torch.cuda.is_available() else None):
                self._net = self._load()  # a random teacher seeds the generators; the student's dropout must not notice
        return self._net

    def _rounded(self, value: Tensor) -> Tensor:
        return value.half().float() if self.store.layout.dtype == "float16" else value

    def _tell_changed(self, image: int) -> None:
        path = self._loader.source.path(image)
        if path not in self._changed and len(self._changed) < _NAMED:
            log.warning("%s has changed since the teacher cache was written; its features are computed anew", path)
        self._changed.add(path)


def _outputs(net: FeatureModel, images: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        output = net(images)
    return {kind: _of_kind(net, output, kind) for kind in kinds}


def _of_kind(net: FeatureModel, output: ModelOutput, kind: str) -> Tensor:
    if kind.startswith(_TAP):
        return pool_tap(output.taps[kind[len(_TAP) :]], kind)
    if found := _MAP.fullmatch(kind):
        prefix = int(getattr(net.net, "num_prefix_tokens", 0) or 0)
        return to_grid(output.taps[found[2]].float(), int(found[1]), prefix).flatten(1)
    return getattr(output, kind).float()


def cache_root() -> Path:
    """Where ``cache="auto"`` keeps its stores: ``$XDFAST_CACHE/teacher``, else ``~/.cache/xdfast/teacher``."""
    return Path(os.environ.get("XDFAST_CACHE") or "~/.cache/xdfast").expanduser() / "teacher"


def stores(root: Path | None = None) -> Iterator[Path]:
    """Folders of the stores under ``root``, by name."""
    root = cache_root() if root is None else root
    if root.is_dir():
        yield from sorted(path.parent for path in root.glob("*/manifest.json"))


def open_store(
    cache: str,
    teacher: FeatureModel,
    teacher_hash: str,
    source: ImageSource,
    loader: ImageLoader,
    kinds: tuple[str, ...],
    *,
    views: int,
    dtype: str,
    precision: str,
    amp: str,
) -> TeacherStore:
    """The store that fits a run exactly: this teacher's weights and input, these views of these images.

    Args:
        cache: ``"auto"``, or the folder of the store.
        teacher, teacher_hash: the model and the hash of its weights.
        source: training images.
        loader: their views.
        kinds: outputs to keep.
        views, dtype, precision, amp: settings of the run.

    Raises:
        ValueError: the folder holds a store of another teacher, other views or other data; names what differs.
        StoreFull: no room.
    """
    facts: dict[str, Any] = {
        "teacher": teacher.name,
        "weights": teacher_hash,
        "input": {"size": teacher.image_size, "mean": list(teacher.mean), "std": list(teacher.std)},
        "precision": precision,
        "amp": amp,
        "data": source.fingerprint(),
        "views": loader.views.facts(),
        # Pillow and DALI on the CPU give the same pixels; a GPU's decoder and resize round otherwise.
        "pixels": "gpu" if loader.decoder == "dali-gpu" else "cpu",
    }
    widths = {"features": teacher.num_features, "logits": teacher.num_classes}
    widths |= {f"{_TAP}{tap}": width for tap, width in (tap_widths(teacher) if teacher.taps else {}).items()}
    widths |= {k: widths[_TAP + found[2]] * int(found[1]) ** 2 for k in kinds if (found := _MAP.fullmatch(k))}
    shape: dict[str, Any] = {"samples": len(source), "views": views, "outputs": {k: widths[k] for k in kinds}}
    folder = Path(cache).expanduser()
    if cache == "auto":
        key = hashlib.sha256(json.dumps([facts, shape, dtype], sort_keys=True).encode()).hexdigest()[:12]
        folder = cache_root() / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', teacher.name)}-{key}"
    store = TeacherStore.open(folder, facts, dtype=dtype, **shape)
    if distributed.is_main():
        log.info(
            "teacher cache %s: %s of %s rows, %.2f GB when full",
            folder, f"{store.count:,}", f"{store.total:,}", store.nbytes / 1e9,
        )  # fmt: skip
    return store
