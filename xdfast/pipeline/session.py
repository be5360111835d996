"""One process's share of a run: its clock, its throughput, and the wish to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from xdfast import distributed

__all__ = ["Session", "StoppedAtOnce"]

log = logging.getLogger("xdfast")


class StoppedAtOnce(BaseException):
    """SIGTERM or Ctrl-C came where no step is under way; no ``Exception``, so that nothing on the way takes it for an error."""


class Session:
    """Clock, throughput, and the wish to stop: everything about this process's share of the run."""

    def __init__(self, seconds_before: float, checkpoint_seconds: float) -> None:
        self._before, self._every = seconds_before, checkpoint_seconds
        self._began = self._saved_at = time.monotonic()
        self._images = 0
        self._stop = False  # asked of this process, at any moment
        self._stopping = False  # agreed with the other ranks, and so preceded by a save
        self._signal = 0
        self._at_once = False  # no step is under way, and no other rank waits for this one

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def count(self, images: int) -> None:
        self._images += images

    def images_per_second(self) -> float:
        return self._images / max(time.monotonic() - self._began, 1e-9)

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def due(self, step: int, *, epoch_ends: bool = False) -> bool:
        """Whether a resume file is due now; every rank gets the same answer (rank 0's clock, anyone's signal).

        The end of an epoch is a good moment, so it comes early there, but not after every epoch of a fraction of a second.
        """
        patience = self._every / 10 if epoch_ends else self._every
        due = time.monotonic() - self._saved_at >= patience
        if distributed.world_size() == 1:
            self._stopping = self._stop
            return due or self._stopping
        if not epoch_ends and step % 10:  # asking costs a message: every ten steps is often enough
            return False
        votes = distributed.sum_over_ranks(
            [float(self._stop), float(due and distributed.is_main())],
            torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"),
        )
        self._stopping = votes[0] > 0
        return self._stopping or votes[1] > 0

    @contextlib.contextmanager
    def catch_termination(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the loop to save at the next step; a second Ctrl-C stops at once."""
        previous = {}

        def ask(number: int, frame: Any) -> None:
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop, self._signal = True, number
            self._leave()

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: Python delivers signals elsewhere, nothing to catch here
            log.debug("training outside the main thread: SIGTERM does not save first")
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Validation, or filling a cache, which can take minutes: SIGTERM and Ctrl-C do not wait for its end.

        Several processes do: they wait for each other in there, and can only stop together.

        Raises:
            StoppedAtOnce: asked to stop, in here or just before.
        """
        self._at_once = distributed.world_size() == 1
        try:
            if self._stop:
                self._leave()
            yield
        finally:
            self._at_once = False

    def _leave(self) -> None:
        if self._at_once:
            self._at_once, self._stopping = False, True
            raise StoppedAtOnce

    def stop_if_asked(self, out: Path) -> None:
        if self._stopping:
            log.warning("stopped; the state is saved in %s, the same command continues", out)
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(0)
