"""Where a row is, and what its bytes mean.

Rows are numbered view by view: ``row = view · samples + sample``. A row holds all outputs side by side, so one gather and
one CRC serve them all. Shards are blocks of consecutive rows; an untouched block has no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ENTRY_BYTES", "Layout", "store_bytes"]

ENTRY_BYTES = 8
BLOCK = 65_536  # rows of a shard: 134 MB at 1024 values in fp16
MAX_SHARDS = 256  # a mapped shard holds a file descriptor (usual limit: 1024), so large stores get larger shards

_DTYPES: dict[str, tuple[torch.dtype, np.dtype, float]] = {  # with the largest magnitude it holds
    "float16": (torch.float16, np.dtype("<f2"), torch.finfo(torch.float16).max),
    "float32": (torch.float32, np.dtype("<f4"), torch.finfo(torch.float32).max),
}


def store_bytes(samples: int, views: int, outputs: Mapping[str, int], dtype: str) -> int:
    """Bytes of all rows: ``samples · views · Σ widths · bytes per value``. The index adds 8 bytes a row.

    Raises:
        ValueError: not positive, no outputs, or a dtype other than ``"float16"`` and ``"float32"``.
    """
    layout = Layout(samples, views, dict(outputs), dtype)
    return layout.total * layout.row_bytes


@dataclass(frozen=True)
class Layout:
    """Shape of a store. ``block`` 0: the usual one.

    Raises:
        ValueError: see :func:`store_bytes`.
    """

    samples: int
    views: int
    outputs: dict[str, int]
    dtype: str
    block: int = 0
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        _check_size("samples", self.samples)
        _check_size("views", self.views)
        for name, width in self.outputs.items():
            _check_size(f"the width of output {name!r}", width)
        if not self.outputs:
            raise ValueError('outputs must name at least one output and its width, such as {"features": 1024}')
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, _DTYPES))}, got {self.dtype!r}")
        set_ = object.__setattr__
        set_(self, "samples", int(self.samples))
        set_(self, "views", int(self.views))
        set_(self, "outputs", {name: int(width) for name, width in self.outputs.items()})
        set_(self, "row_bytes", sum(self.outputs.values()) * _DTYPES[self.dtype][1].itemsize)
        if self.block == 0:
            block = BLOCK
            while self.total > block * MAX_SHARDS:
                block *= 2
            set_(self, "block", block)

    @property
    def total(self) -> int:
        return self.samples * self.views

    @property
    def shards(self) -> int:
        return -(-self.total // self.block)

    def shard_rows(self, shard: int) -> int:
        return min(self.block, self.total - shard * self.block)

    def shard_bytes(self, shard: int) -> int:
        return self.shard_rows(shard) * self.row_bytes

    def rows(self, ids: Any, views: Any) -> np.ndarray:
        """Row numbers, int64 ``[B]``.

        Raises:
            TypeError: not integers.
            ValueError: not one-dimensional, lengths that differ, or outside the store.
        """
        sample = _integers("ids", ids, self.samples, "this store has samples")
        view = _integers("views", views, self.views, "this store has views", len(sample))
        return view * self.samples + sample

    def digests(self, digests: Any, count: int) -> np.ndarray:
        """uint64 ``[B]`` in ``[0, 2³²)``. Raises as :meth:`rows`."""
        return _integers("digests", digests, 2**32, "a digest is a CRC-32 of the image file,", count).astype(np.uint64)

    def order(self, rows: np.ndarray) -> np.ndarray:
        """What sorts rows. Raises ValueError if one comes twice."""
        order = np.argsort(rows, kind="stable")
        twice = np.flatnonzero(np.diff(rows[order]) == 0)
        if len(twice):
            raise ValueError(f"{self.where(int(rows[order[twice[0]]]))} comes twice in one write; pass each row once")
        return order

    def where(self, row: int) -> str:
        return f"sample {row % self.samples}, view {row // self.samples}"

    def pack(self, outputs: Mapping[str, Tensor], rows: np.ndarray) -> np.ndarray:
        """The bytes of rows, uint8 ``[B, row_bytes]``.

        Raises:
            TypeError: not floating point tensors.
            ValueError: missing or unknown outputs, wrong shapes, values the dtype cannot hold.
        """
        if set(outputs) != set(self.outputs):
            raise ValueError(f"expected the outputs {sorted(self.outputs)}, got {sorted(outputs)}")
        torch_dtype, numpy_dtype, limit = _DTYPES[self.dtype]
        packed = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        at = 0
        for name, width in self.outputs.items():
            tensor = outputs[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"output {name!r} must be a floating point tensor, got {kind}")
            if tuple(tensor.shape) != (len(rows), width):
                raise ValueError(
                    f"output {name!r} must have shape [{len(rows)}, {width}] (rows, width), got {list(tensor.shape)}"
                )
            values = tensor.detach().cpu().float()
            peak = values.abs().amax(dim=1)  # NaN wins in amax, and no comparison with it is true
            bad = torch.nonzero(~(peak <= limit))
            if len(bad):
                self._refuse(name, int(rows[bad[0, 0]]), float(peak[bad[0, 0]]), len(bad))
            end = at + width * numpy_dtype.itemsize
            packed[:, at:end] = values.to(torch_dtype).numpy().astype(numpy_dtype, copy=False).view(np.uint8)
            at = end
        return packed

    def _refuse(self, name: str, row: int, peak: float, count: int) -> None:
        where = f"output {name!r} of {self.where(row)}" + (f" (and {count - 1} more rows)" if count > 1 else "")
        if not np.isfinite(peak):
            raise ValueError(
                f"{where} is not finite ({peak}): the teacher is broken or overflows in its precision; run it in float32 and "
                "look at its input, nothing of this batch was stored"
            )
        raise ValueError(
            f"{where} reaches {peak:g}, beyond the 65504 that float16 holds: use a store with dtype=\"float32\""
        )  # fmt: skip

    def unpack(self, packed: np.ndarray) -> dict[str, Tensor]:
        """float32 ``[B, D]`` per output, in memory of their own."""
        values = packed.view(_DTYPES[self.dtype][1])
        tensors, at = {}, 0
        for name, width in self.outputs.items():
            tensors[name] = torch.from_numpy(values[:, at : at + width].astype(np.float32))
            at += width
        return tensors


def _check_size(what: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be an integer ≥ 1, got {value!r}")


def _integers(name: str, values: Any, end: int, meaning: str, count: int | None = None) -> np.ndarray:
    """int64 ``[B]``, checked to be in ``[0, end)``; one integer stands for ``count`` of them."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim == 0 and count is not None:
        array = np.broadcast_to(array, (count,))
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [B], got {list(array.shape)}")
    if count is not None and len(array) != count:
        raise ValueError(f"{name} must be as many as ids ({count}), got {len(array)}")
    outside = np.flatnonzero((array < 0) | (array >= end))
    if len(outside):
        raise ValueError(f"{name} has {array[outside[0]]} at position {outside[0]}; {meaning} 0 to {end - 1}")
    return array.astype(np.int64)
