"""One static table of tile sizes: (kernel, architecture, input dtype) → tile. No autotuning at run time.

A tile chosen at run time would make the first step slow, the result depend on what else the GPU did at that moment, and
CUDA-graph capture fail. Changing a row here means running ``python -m xdfast.kernels.aot`` (registers, spills) and the
benchmark on that architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "KERNELS", "Tile", "dtype_key", "lookup", "tiles"]


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        rows: rows of the tile, a power of two.
        columns: columns per program, a power of two.
        warps: warps per program.
        stages: software pipeline depth of loops.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1


#: Compute capabilities with rows of their own, as major * 10 + minor. A newer device takes the nearest below it.
ARCHITECTURES = (80, 90, 100)

# Kernels that hold all rows of a column block in registers, smallest tile first: rows * columns / (32 * warps) values a
# thread, kept at 32 or below. 16 columns: 32 bytes (one sector) a row in half precision, 64 in fp32, and D = 768 still
# gives 48 programs. `column_standardize_stream` reads longer columns in three passes, from L2 after the first.
_RESIDENT = (
    Tile(16, 16, 1),
    Tile(32, 16, 1),
    Tile(64, 16, 2),
    Tile(128, 16, 4),
    Tile(256, 16, 4),
    Tile(512, 16, 8),
    Tile(1024, 16, 16),
)
_STREAM_FP32 = (Tile(256, 16, 8, 2),)
# 4 warps and 64 rows: with 8 warps, 128 rows spill under Triton 3.5 (sm_90, bf16) and 64 rows under Triton 3.9.
_STREAM_HALF = (Tile(64, 32, 4, 2),)

_TABLE: dict[tuple[str, int, str], tuple[Tile, ...]] = {}
for _arch in ARCHITECTURES:
    for _dtype in ("fp32", "bf16", "fp16"):
        _TABLE["column_standardize_resident", _arch, _dtype] = _RESIDENT
        _TABLE["column_standardize_stream", _arch, _dtype] = _STREAM_FP32 if _dtype == "fp32" else _STREAM_HALF

#: Kernels of the table.
KERNELS = tuple(sorted({kernel for kernel, _, _ in _TABLE}))


def dtype_key(dtype: object) -> str:
    """``torch.float32`` → ``"fp32"`` and so on; KeyError for a dtype no kernel takes."""
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(dtype)]


def tiles(kernel: str, arch: int, dtype: str) -> tuple[Tile, ...]:
    """All tiles of a kernel on one architecture, smallest first."""
    known = [a for a in ARCHITECTURES if a <= arch] or [ARCHITECTURES[0]]
    return _TABLE[kernel, known[-1], dtype]


def lookup(kernel: str, arch: int, dtype: str, rows: int) -> Tile | None:
    """The smallest tile with at least ``rows`` rows, or None if the column is longer than every tile."""
    for tile in tiles(kernel, arch, dtype):
        if rows <= tile.rows:
            return tile
    return None
