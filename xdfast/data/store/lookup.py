"""Which rows are there, of the right image, and whole."""

from __future__ import annotations

import numpy as np

from xdfast.data.store.shards import Shards

__all__ = ["CHANGED", "HIT", "MISS", "lookup"]

HIT, MISS, CHANGED = 0, 1, 2


def lookup(shards: Shards, rows: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of rows (zero unless HIT), uint8 ``[B, row_bytes]``; status, uint8 ``[B]``; and the rows found damaged."""
    entries = shards.index[rows].astype(np.uint64)  # before the rows, which are written before their entries
    status = np.full(len(rows), MISS, dtype=np.uint8)
    there = (entries & 1) == 1
    same = there & (entries >> 32 == digests)
    status[there & ~same] = CHANGED
    hit = np.flatnonzero(same)
    found = shards.gather(rows[hit])
    sound = shards.sound(found, rows[hit], entries[hit])
    damaged = rows[hit[~sound]]
    if len(damaged):
        hit, found = hit[sound], found[sound]
    status[hit] = HIT
    if len(hit) == len(rows):
        return found, status, damaged
    packed = np.zeros((len(rows), shards.layout.row_bytes), dtype=np.uint8)
    packed[hit] = found
    return packed, status, damaged
