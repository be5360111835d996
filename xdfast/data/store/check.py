"""What is in a store: a check of every row, and a summary to print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xdfast.data.store.files import disk_bytes
from xdfast.data.store.layout import Layout
from xdfast.data.store.shards import Shards

if TYPE_CHECKING:
    from xdfast.data.store.store import TeacherStore

__all__ = ["StoreCheck", "check_rows", "describe"]

_STEP = 4096  # rows read at a time
_EXAMPLES = 8


@dataclass(frozen=True)
class StoreCheck:
    """Rows by state; ``present + damaged + missing == total``."""

    total: int
    present: int  # and their CRC is right
    damaged: int  # said to be present, with other bytes than were written
    missing: int
    examples: tuple[tuple[int, int], ...] = ()  # (sample, view) of the first damaged rows

    @property
    def complete(self) -> bool:
        return self.present == self.total

    def __str__(self) -> str:
        text = f"{self.present:,} of {self.total:,} rows present, {self.damaged:,} damaged, {self.missing:,} missing"
        if self.examples:
            text += f"; damaged (sample, view): {', '.join(map(str, self.examples))}" + (
                " …" if self.damaged > len(self.examples) else ""
            )
        return text


def check_rows(shards: Shards, layout: Layout, progress: Callable[[int, int], None] | None, forget: bool) -> StoreCheck:
    """See :meth:`TeacherStore.verify`."""
    present = damaged = 0
    examples: list[tuple[int, int]] = []
    for start in range(0, layout.total, _STEP):
        stop = min(start + _STEP, layout.total)
        entries = shards.index[start:stop].astype(np.uint64)
        here = np.flatnonzero(entries)  # an entry without its present bit is damage, not absence
        if len(here):
            entries, rows = entries[here], start + here
            good = shards.sound(shards.gather(rows), rows, entries) & ((entries & 1) == 1)
            bad = rows[~good]
            present += int(good.sum())
            damaged += len(bad)
            examples += [(r % layout.samples, r // layout.samples) for r in bad[: _EXAMPLES - len(examples)].tolist()]
            if forget and len(bad):
                shards.forget(bad, entries[~good])
        if progress is not None:
            progress(stop, layout.total)
    return StoreCheck(layout.total, present, damaged, layout.total - present - damaged, tuple(examples))


def describe(store: TeacherStore) -> list[tuple[str, str]]:
    """Label and value of each line of a summary: rows, sizes, outputs, when and by what it was made, then every fact."""
    layout = store.layout
    share = f" ({store.count / store.total:.1%})" if not store.complete else " (complete)"
    lines = [
        ("folder", str(store.folder)),
        ("rows", f"{store.count:,} of {store.total:,}{share}"),
        ("samples × views", f"{layout.samples:,} × {layout.views}"),
        ("outputs", ", ".join(f"{name} [{width}]" for name, width in layout.outputs.items()) + f", {layout.dtype}"),
        ("size when full", _size(store.nbytes)),
        ("size on disk", _size(disk_bytes(store.folder))),
        ("created", f"{store.created} by xdfast {store.version}"),
    ]
    return lines + [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in store.facts.items()
    ]


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
