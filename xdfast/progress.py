"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressLine", "clock"]


class ProgressLine:
    """A rich bar with ETA and images/s on a terminal; a plain line every ``every`` seconds elsewhere."""

    def __init__(self, title: str, total: int, start: int = 0, *, enabled: bool = True, every: float = 10.0) -> None:
        self._title, self._total, self._start, self._every = title, total, start, every
        self._enabled = enabled
        self._began = self._last = time.monotonic()
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def update(self, step: int, note: str) -> None:
        """Shows that ``step`` of ``total`` steps are done, with a short note such as loss and images/s."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if self._enabled and now - self._last >= self._every:
            self._last = now
            done = max(step - self._start, 1)
            eta = (now - self._began) / done * (self._total - step)
            print(f"{self._title}  {step}/{self._total}  {note}  ETA {clock(eta)}", file=sys.stderr, flush=True)

    def close(self, summary: str = "") -> None:
        """Ends the bar; ``summary`` is printed as a plain line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._enabled and summary:
            print(f"{self._title}  {summary}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """``4:05`` or ``1:04:05``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
