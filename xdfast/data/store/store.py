"""Rows of a frozen teacher's outputs on disk, by sample and view."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from xdfast.data.store import files
from xdfast.data.store.check import StoreCheck, check_rows
from xdfast.data.store.folder import make_folder, read_manifest
from xdfast.data.store.layout import ENTRY_BYTES, Layout
from xdfast.data.store.lookup import CHANGED, HIT, MISS, lookup
from xdfast.data.store.manifest import Manifest
from xdfast.data.store.shards import Shards

__all__ = ["CHANGED", "HIT", "MISS", "TeacherStore"]

log = logging.getLogger("xdfast")


class TeacherStore:
    """A row of outputs per (sample, view), each checked by a CRC whenever it is read. Made by :meth:`open`.

    A folder with ``manifest.json``, ``index.bin`` (8 bytes a row) and ``rows-NNNNN.bin`` (blocks of rows). Any number of
    processes may have it open. Two that write the same row at the same time leave one of the rows or a damaged one, which
    reads as :data:`MISS`. Several threads may read and prefetch while one writes; an object may be used after a fork.

    Attributes:
        folder: where it is.
        facts: what the rows depend on, as JSON gave it back.
        layout: ``samples``, ``views``, ``outputs`` (name → width), ``dtype``.
        read_only: :meth:`write` raises.
        created, version: when (UTC) and by which xdfast it was made.
        damaged: rows found damaged by :meth:`read` so far.
    """

    def __init__(self, folder: Path, manifest: Manifest, read_only: bool) -> None:
        self.folder = folder
        self.facts = manifest.facts
        self.layout = manifest.layout
        self.created = manifest.created
        self.version = manifest.version
        self.read_only = read_only
        self.damaged = 0
        self._shards: Shards | None = Shards(folder, manifest.layout, read_only)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        facts: Mapping[str, Any],
        *,
        samples: int,
        views: int,
        outputs: Mapping[str, int],
        dtype: str = "float16",
        read_only: bool = False,
    ) -> TeacherStore:
        """Opens the store in ``folder``, or makes an empty one.

        Args:
            folder: made if it is not there; several processes may do so at once.
            facts: everything the rows depend on, as plain JSON values: teacher weights, input, precision, views, data…
            samples: sample ids are ``0 … samples - 1``.
            views: view ids are ``0 … views - 1``.
            outputs: name → width, such as ``{"features": 1024, "logits": 1000}``.
            dtype: ``"float16"`` (magnitudes to 65504, above 6.1e-5 within 4.9e-4 of the value) or ``"float32"`` (exact).
            read_only: never writes, never makes anything.

        Raises:
            ValueError: the folder was filled for other facts, samples, views, outputs or dtype (names each with both
                values), is damaged, or an argument is out of range.
            TypeError: a fact that JSON cannot hold.
            FileNotFoundError: ``read_only`` and no store there.
            StoreFull: no room for the index.
            OSError: the file system has no file locks.
        """
        folder = Path(folder).expanduser()
        layout = Layout(samples, views, dict(outputs), dtype)
        manifest = Manifest.new(layout, facts)
        if not read_only:
            try:
                make_folder(folder, manifest)
            except OSError as error:
                if files.is_full(error):
                    raise files.full(error, folder, layout.total * ENTRY_BYTES, "No row was lost") from error
                raise
        there = read_manifest(folder)
        there.check_same(layout, facts, folder)
        store = cls(folder, there, read_only)
        if not read_only:
            need, free = store._files.missing_bytes(), shutil.disk_usage(folder).free
            if need > free:
                log.warning("%s needs %s more bytes when full; the disk has %s free", folder, f"{need:,}", f"{free:,}")
        return store

    @classmethod
    def load(cls, folder: str | Path) -> TeacherStore:
        """Opens whatever store is in ``folder``, read-only.

        Raises:
            FileNotFoundError: no store there.
            ValueError: damaged, or of another format.
        """
        folder = Path(folder).expanduser()
        return cls(folder, read_manifest(folder), read_only=True)

    def write(self, ids: Any, views: Any, digests: Any, outputs: Mapping[str, Tensor]) -> None:
        """Stores rows; those already there are replaced. All arguments are checked before anything is written.

        Args:
            ids: samples, integers ``[B]``.
            views: integers ``[B]``, or one for all.
            digests: CRC-32 of the image file each row was made from, ``[B]`` in ``[0, 2³²)``, or one for all.
            outputs: every output of the store, floating point ``[B, width]`` on any device.

        Raises:
            ValueError: out of range, a row given twice, wrong shapes or names, a value that is not finite or that the dtype
                cannot hold (names the sample).
            TypeError: ids, views or digests that are not integers, outputs that are not floating point tensors.
            StoreFull: no room. Rows of earlier calls stay; some of this call may be there, whole.
            RuntimeError: opened read-only, or closed.
        """
        shards, layout = self._files, self.layout
        if self.read_only:
            raise RuntimeError(f"{self.folder} is open for reading only; open it with read_only=False to write")
        rows = layout.rows(ids, views)
        digest = layout.digests(digests, len(rows))
        packed = layout.pack(outputs, rows)
        order = layout.order(rows)
        with self._telling_of_full_disks():
            shards.make(rows)
            shards.put(rows[order], packed[order], digest[order])

    def read(self, ids: Any, views: Any, digests: Any) -> tuple[dict[str, Tensor], np.ndarray]:
        """Rows and what they are worth.

        Args:
            ids, views, digests: as for :meth:`write`; a row may come more than once.

        Returns:
            ``{name: float32 [B, width]}`` in fresh memory, and the status, uint8 ``[B]``: :data:`HIT`; :data:`MISS` (never
            written, or damaged); :data:`CHANGED` (made from an image file with another digest). Rows that are not a HIT are
            zero.

        Raises:
            ValueError, TypeError: as for :meth:`write`.
            RuntimeError: closed.
        """
        shards, layout = self._files, self.layout
        rows = layout.rows(ids, views)
        digest = layout.digests(digests, len(rows))
        packed, status, damaged = lookup(shards, rows, digest)
        if len(damaged):
            self._found_damage(damaged)
        return layout.unpack(packed), status

    def prefetch(self, ids: Any, views: Any) -> None:
        """Asks the system to bring rows into memory, and does not wait: call it a batch or more ahead of :meth:`read`.

        Raises:
            ValueError, TypeError: as for :meth:`write`.
            RuntimeError: closed.
        """
        self._files.prefetch(self.layout.rows(ids, views))

    @property
    def count(self) -> int:
        """Rows present, those of other processes included. Walks the index: about 1 ms per million rows."""
        return self._files.count()

    def missing(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, views), int64 ``[M]`` each, of the rows that were never written, view by view."""
        rows = np.flatnonzero(self._files.index[: self.total] == 0)
        return rows % self.layout.samples, rows // self.layout.samples

    @property
    def total(self) -> int:
        return self.layout.total

    @property
    def complete(self) -> bool:
        """Every row is present. Damaged rows count, until they are written again or ``verify(forget=True)`` drops them."""
        return self.count == self.total

    @property
    def nbytes(self) -> int:
        """Bytes of all rows when the store is full (see :func:`store_bytes`)."""
        return self.layout.total * self.layout.row_bytes

    def verify(self, progress: Callable[[int, int], None] | None = None, *, forget: bool = False) -> StoreCheck:
        """Reads every row and checks its CRC. Rows that are being written meanwhile may be called damaged.

        Args:
            progress: called with rows done and rows in all.
            forget: makes damaged rows absent, so that :attr:`count` is right and the next run fills them.

        Raises:
            RuntimeError: closed, or ``forget`` on a store opened read-only.
        """
        if forget and self.read_only:
            raise RuntimeError(f"{self.folder} is open for reading only; open it with read_only=False to forget rows")
        return check_rows(self._files, self.layout, progress, forget)

    def flush(self) -> None:
        """Brings what this process wrote to the disk; returns when it is safe from a power cut.

        Raises:
            StoreFull, OSError: the disk would not take it; nothing is safe then but what an earlier flush wrote.
            RuntimeError: closed.
        """
        with self._telling_of_full_disks():
            self._files.flush()

    def close(self) -> None:
        """Flushes and lets go of the files. Once more does nothing."""
        if self._shards is not None:
            try:
                self.flush()
            finally:
                self._shards.close()
                self._shards = None

    def __enter__(self) -> TeacherStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TeacherStore({str(self.folder)!r}, {'closed' if self._shards is None else f'{self.count:,} rows'})"

    @property
    def _files(self) -> Shards:
        if self._shards is None:
            raise RuntimeError(f"the store in {self.folder} is closed; open it again")
        return self._shards

    @contextmanager
    def _telling_of_full_disks(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not files.is_full(error):
                raise
            need = max(self._files.missing_bytes(), self.layout.row_bytes)
            kept = f"{self.count:,} of {self.total:,} rows are kept and stay readable"
            raise files.full(error, self.folder, need, kept) from error

    def _found_damage(self, rows: np.ndarray) -> None:
        if not self.damaged:
            log.warning(
                "%s: %d row(s) of this batch are damaged, such as %s; they count as missing (later ones are not logged: "
                "verify the store for a full count)",
                self.folder, len(rows), self.layout.where(int(rows[0])),
            )  # fmt: skip
        self.damaged += len(rows)
