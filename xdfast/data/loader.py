"""``ImageLoader``: the same batches whatever the number of workers, wherever a run was interrupted."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from xdfast.data.batches import BatchPlan, EpochPlan
from xdfast.data.dali_reader import DaliReader
from xdfast.data.decoder import Decoder, choose_decoder
from xdfast.data.prefetch import prefetched
from xdfast.data.reader import Batch, BatchReader, make_batch
from xdfast.data.sources import ImageSource
from xdfast.data.views import Augment, Views
from xdfast.data.worker_death import is_death, obituary, report_when_waiting, survive_held_lock
from xdfast.data.worker_signals import end, leave_signals_to_parent, look_after

__all__ = ["ImageLoader", "choose_workers"]

log = logging.getLogger("xdfast")

_MAX_WORKERS = 8
_MAX_THREADS = 32  # of DALI: a thread costs no copy of the process
_SMALL_VIEW = 64
_MANY = 10_000
_AHEAD = 2  # batches DALI makes ahead of the training step


class ImageLoader:
    """Batches of views: Pillow in the processes of torch's DataLoader, or NVIDIA DALI's threads.

    Every random choice is a function of (seed, epoch, sample id): the same images for any number of workers, and
    ``epoch(e, start=k)`` gives exactly the batches an unbroken epoch would have given from number ``k`` on. Global random
    generators are left as found.

    Unreadable images are named once in a warning and collected in :attr:`bad`. In training another image takes the
    place (its own id and label); in evaluation the row stays, with ``valid`` False.

    Args:
        source: images, see :func:`open_source`.
        batch_size: images per batch and process. A training set smaller than one batch gives one batch of all of it.
        image_size: S, side of the views in pixels.
        train: shuffled and augmented; else in order, every image once over all ranks.
        augment: see :class:`Augment`.
        seed: of order and views.
        rank, world_size: this process and how many share the images; every rank gets the same number of batches.
        workers: processes that read; ``"auto"``: none where small images are in memory, else one per core and
            rank of this machine, at most 8. Under DALI threads, as many for reading as for decoding, at most 32.
        drop_last: leave out an incomplete last batch; default: in training.
        exact: in training, every image exactly once per epoch: the last batch is smaller, on some ranks perhaps empty, see
            :class:`EpochPlan`. Takes the place of ``drop_last``.
        repeats: views of each image in a batch of training, see :class:`EpochPlan`.
        max_bad: unreadable images to put up with; default: a tenth of them all, at least 10; never all.
        decoder: ``"pillow"``, ``"dali"``, ``"dali-gpu"`` (decodes on the current GPU; batches come as CUDA tensors), or
            ``"auto"``, see :func:`choose_decoder`. Ids, labels and crops are the same with each; pixels to the rounding of
            the resize.
        view_seed: of the views alone, so that runs with other orders can share a cache of them; default: ``seed``.
        fixed_views: K, so many views of each image, taken in turns over the epochs; default: a new one in every epoch.
        digests: fills :attr:`Batch.digests`, which tell a changed image file.

    Attributes:
        decoder: the one chosen.
        decoder_reason: why.
        watch: called with every plan of an epoch some batches before it is handed out, from whichever thread reads ahead.
        bad: path → reason of the unreadable images met so far. To continue a run, put those of the earlier part in.
        batches_per_epoch: per rank, the same on every rank.

    Raises:
        ValueError: a value out of range, a policy timm does not know, fewer training images than processes.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        image_size: int,
        train: bool,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | Literal["auto"] = "auto",
        drop_last: bool | None = None,
        max_bad: int | None = None,
        decoder: Decoder = "auto",
        fixed_views: int | None = None,
        digests: bool = False,
        view_seed: int | None = None,
        exact: bool = False,
        repeats: int = 1,
    ) -> None:
        if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
            raise ValueError(f"workers must be 'auto' or an integer ≥ 0, got {workers!r}")
        self.source = source
        self.bad: dict[str, str] = {}
        self.max_bad = max(10, len(source) // 10) if max_bad is None else max_bad
        views = Views(augment or Augment(), image_size, train, seed if view_seed is None else view_seed)
        self.views = views
        self._plan = EpochPlan(
            len(source), batch_size, train, seed, rank, world_size, drop_last, fixed_views, exact, repeats
        )
        self.batches_per_epoch = self._plan.batches_per_epoch
        self.batch_size = self._plan.batch_size
        self.decoder, self.decoder_reason = choose_decoder(decoder, source, views)
        threads = _MAX_WORKERS if self.decoder == "pillow" else _MAX_THREADS
        self.workers = choose_workers(source, views, world_size, threads) if workers == "auto" else workers
        self.watch: Callable[[BatchPlan], None] | None = None
        self._turn = 0
        make = _Worked if self.decoder == "pillow" else _Threaded
        self._engine: _Worked | _Threaded = make(self._plan, source, views, self.workers, self.decoder, digests)
        log.debug(
            "%s: %d images, %d batches of %d for each of %d process(es), %d workers, decoder %s (%s)",
            source.name, len(source), self.batches_per_epoch, self.batch_size, world_size, self.workers,
            self.decoder, self.decoder_reason,
        )  # fmt: skip

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: number ≥ 0; evaluation is the same in each.
            start: number of the first batch, to continue within an epoch.

        Raises:
            ValueError: numbers out of range.
            RuntimeError: while iterating: too many unreadable images, a worker process died, or another epoch of this loader
                was begun in the meantime.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be ≥ 0, got {epoch!r}")
        if not 0 <= start <= self.batches_per_epoch:
            raise ValueError(f"start must be in [0, {self.batches_per_epoch}], the batches of an epoch, got {start!r}")
        plans: Iterator[BatchPlan] = self._plan.batches(epoch, start)
        if self.watch is not None:
            plans = map(_watched(self.watch), plans)
        return self._batches(plans, start, f"epoch {epoch}")

    def rows(self, number: int) -> int:
        """Rows of batch ``number`` of an epoch on all ranks together."""
        return self._plan.rows(number)

    def read(self, plans: Sequence[BatchPlan]) -> Iterator[Batch]:
        """Batches of chosen samples and views, such as those a teacher cache lacks; as :meth:`epoch` otherwise."""
        return self._batches(iter(plans), 0, "those asked for")

    def close(self) -> None:
        """Ends the worker processes; an epoch under way cannot go on, the next one starts new workers."""
        self._turn += 1
        self._engine.close()

    def _batches(self, plans: Iterator[BatchPlan], start: int, of: str) -> Iterator[Batch]:
        self._turn += 1
        turn = self._turn
        empty: list[BatchPlan] = []  # of exact tails: only the last of an epoch, and nothing that a reader could read
        for batch in self._engine.batches(_with_rows(plans, empty), start, of):
            self._note(batch.bad)
            yield batch
            if turn != self._turn and self._engine.exclusive:
                raise RuntimeError(
                    "this loader was closed, or another epoch() begun, before this one ended; use a second ImageLoader"
                )
        for plan in empty:
            size = self.views.image_size
            nothing = np.zeros(0, np.int64)
            yield make_batch(
                torch.zeros((0, 3, size, size), dtype=torch.uint8), nothing, plan, nothing, nothing > 0, nothing, {}
            )

    def _note(self, bad: dict[str, str]) -> None:
        for path, reason in bad.items():
            if path not in self.bad:
                self.bad[path] = reason
                log.warning("skipped an unreadable image: %s: %s", path, reason)
        if bad and len(self.bad) > min(self.max_bad, len(self.source) - 1):  # all of them are too many in any case
            shown = "; ".join(f"{path}: {reason}" for path, reason in list(self.bad.items())[:3])
            raise RuntimeError(
                f"{len(self.bad)} of {len(self.source)} images of {self.source.name} cannot be read, "
                f"more than max_bad={self.max_bad} allows ({shown}; …); "
                "repair or remove them, or raise max_bad"
            )


class _Worked:
    """Pillow, in the processes of a DataLoader (in this one without workers)."""

    def __init__(
        self, plan: EpochPlan, source: ImageSource, views: Views, workers: int, decoder: str, digests: bool
    ) -> None:
        self.exclusive = workers > 0
        self._source = source
        self._sampler = _Plans()
        self._loader = torch.utils.data.DataLoader(
            BatchReader(source, views, cache=workers == 0, digests=digests),
            batch_size=None,  # the sampler's items are whole batches
            sampler=self._sampler,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # the DataLoader draws a number; not from the global generator
        )

    def batches(self, plans: Iterator[BatchPlan], start: int, of: str) -> Iterator[Batch]:
        self._sampler.begin(plans)
        number = start
        try:
            iterator: Any = iter(self._loader)
            report_when_waiting(iterator)
            survive_held_lock(iterator)
            look_after(getattr(iterator, "_workers", []))
            for batch in iterator:
                self._sampler.under_way.popleft()
                number += 1
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            processes = getattr(self._loader._iterator, "_workers", [])
            waited = self._sampler.under_way[0].ids if self._sampler.under_way else np.empty(0, np.int64)
            message = is_death(error, processes) and obituary(
                processes, self._source, f"batch {number} of {of}", waited
            )
            if not message:
                raise
            self.close()  # ends the other workers; a new epoch starts new ones
            raise RuntimeError(message) from error

    def close(self) -> None:
        iterator: Any = self._loader._iterator
        self._loader._iterator = None
        if iterator is not None:  # explicitly: a half-read epoch still refers to it and would keep the processes alive
            iterator._shutdown_workers()
            end(getattr(iterator, "_workers", []))


class _Threaded:
    """DALI, in a thread of this process that works ahead."""

    exclusive = True

    def __init__(
        self, plan: EpochPlan, source: ImageSource, views: Views, workers: int, decoder: str, digests: bool
    ) -> None:
        device = torch.cuda.current_device() if decoder == "dali-gpu" else None
        self._reader = DaliReader(source, views, plan.max_rows, max(1, workers), device, digests)
        self._open: Any = None

    def batches(self, plans: Iterator[BatchPlan], start: int, of: str) -> Iterator[Batch]:
        self._stop()
        self._open = prefetched(self._reader.__getitem__, plans, _AHEAD)
        pin = torch.cuda.is_available()
        for batch in self._open:
            yield batch.pin_memory() if pin and not batch.images.is_cuda else batch

    def close(self) -> None:
        self._stop()
        self._reader.close()

    def _stop(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class _Plans(torch.utils.data.Sampler[BatchPlan]):
    """Hands planned batches to the DataLoader; lives in the parent process."""

    def begin(self, plans: Iterator[BatchPlan]) -> None:
        self._plans = plans
        self.under_way: deque[BatchPlan] = deque()  # handed out, not yet come back; they come back in this order

    def __iter__(self) -> Iterator[BatchPlan]:
        for plan in self._plans:
            self.under_way.append(plan)
            yield plan


def choose_workers(source: ImageSource, views: Views, world_size: int, most: int = _MAX_WORKERS) -> int:
    """Workers for ``"auto"``, at most ``most``.

    Shipping a batch between processes costs more than making it where pixels are in memory and views are cheap.
    """
    small = views.image_size <= _SMALL_VIEW and (views.batched or len(source) <= _MANY)
    if source.in_memory and small:
        return 0
    # The cores are shared by the ranks of this machine, which torchrun counts, not by those of all machines.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(np.clip(cores // min(ranks_here, world_size), 1, most))


def _with_rows(plans: Iterator[BatchPlan], empty: list[BatchPlan]) -> Iterator[BatchPlan]:
    for plan in plans:
        if len(plan.ids):
            yield plan
        else:
            empty.append(plan)


def _watched(watch: Callable[[BatchPlan], None]) -> Callable[[BatchPlan], BatchPlan]:
    def pass_on(plan: BatchPlan) -> BatchPlan:
        watch(plan)
        return plan

    return pass_on


def _unchanged(item: Any) -> Any:
    return item
