"""One static table of tile sizes: (kernel, architecture, product dtype) → tiles by size. No autotuning at run time.

A tile chosen at run time would make the first step slow, the result depend on what else the GPU did at that moment, and
CUDA-graph capture fail. Changing a row here means running ``python -m xdfast.kernels.aot`` (registers, spills, shared
memory) and the benchmark on that architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "KERNELS", "PRODUCTS", "Tile", "groups", "lookup", "nearest", "splits", "tiles"]


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Attributes:
        limit: largest size it is taken for (N; for ``product`` the side of its output); None for any.
        rows: rows of the tile, a power of two; both sides of the square tile of ``product``.
        columns: columns of the tile, a power of two.
        warps: warps per program.
        stages: software pipeline depth of loops.
        depth: contraction length of one step of a matrix product.
    """

    limit: int | None
    rows: int
    columns: int
    warps: int
    stages: int = 1
    depth: int = 0


#: Compute capabilities with rows of their own, as major * 10 + minor. A newer device takes the nearest below it.
ARCHITECTURES = (80, 90, 100)
#: How the matrix products are computed: fp32 by IEEE multiply-add, the others on tensor cores.
PRODUCTS = ("fp32", "tf32", "bf16", "fp16")
#: SMs of the largest common part (A100, H100, B200): how many programs a launch should have at least.
_PROCESSORS = {80: 108, 90: 132, 100: 148}

# 16 columns: 32 bytes (one sector) a row in half precision, 64 in fp32, and D = 768 still gives 48 programs. Both
# inputs are held: 2 · rows · columns / (32 · warps) values a thread, kept at 32 or below.
_STANDARDIZE_RESIDENT = (
    Tile(16, 16, 16, 1),
    Tile(32, 32, 16, 1),
    Tile(64, 64, 16, 2),
    Tile(128, 128, 16, 4),
    Tile(256, 256, 16, 8),
    Tile(512, 512, 16, 16),
    Tile(1024, 1024, 8, 16),
)
_STANDARDIZE_STREAM = (Tile(None, 128, 16, 8),)

# Products. Small outputs take small tiles: N = 128 has 10 of 32 × 32, times the splits, and would have 3 of 64 × 64.
# gradient_resident: 16 columns for the reason above, warps so that U is 16 values a thread, steps of 64 in half precision
# (128 bytes, one row of swizzled shared memory; 32 in tf32 likewise) and three in flight where K is longer than two.
# Beyond 512 rows (256 where fp32 doubles the bytes) one program a column block reads too much of K alone, hence _parked.
# Warps are otherwise the fewest that spill nothing under Triton 3.5 and 3.9 on all three architectures.
_HALF = {
    "product": (Tile(256, 32, 32, 4, 3, 64), Tile(1024, 64, 64, 8, 3, 64), Tile(None, 128, 128, 8, 3, 64)),
    "gradient_resident": (
        Tile(16, 16, 16, 1, 2, 16),
        Tile(32, 32, 16, 1, 2, 32),
        Tile(64, 64, 16, 4, 2, 64),
        Tile(128, 128, 16, 4, 3, 64),
        Tile(256, 256, 16, 8, 3, 64),
        Tile(512, 512, 16, 16, 2, 64),
    ),
    "gradient_parked": (Tile(None, 128, 32, 4, 3, 64),),
    "gradient_covariance": (Tile(1024, 64, 64, 4, 3, 64), Tile(None, 128, 64, 8, 3, 64)),
}
# Blackwell's tensor cores take 4 or 8 warps. The rows of its own, each the nearest that spills nothing under Triton 3.5
# and 3.9 (most often the assembler aims at 64, 80 or 128 registers there and just misses): 2 warps or 16 are mma.sync.
_HALF_100 = _HALF | {
    "gradient_covariance": (Tile(1024, 64, 64, 8, 3, 64), _HALF["gradient_covariance"][1]),
    "gradient_resident": (
        *_HALF["gradient_resident"][:2],
        Tile(64, 64, 16, 2, 2, 64),
        _HALF["gradient_resident"][3],
        Tile(256, 256, 16, 8, 2, 64),
        Tile(512, 512, 16, 16, 2, 32),
    ),
}
_TF32 = {
    "product": (Tile(256, 32, 32, 4, 3, 32), Tile(None, 64, 64, 8, 3, 32)),
    "gradient_resident": (
        Tile(16, 16, 16, 1, 2, 16),
        Tile(32, 32, 16, 1, 2, 32),
        Tile(64, 64, 16, 4, 2, 32),
        Tile(128, 128, 16, 4, 3, 32),
        Tile(256, 256, 16, 8, 3, 32),
    ),
    "gradient_parked": (Tile(None, 128, 32, 4, 3, 32),),
    "gradient_covariance": (Tile(None, 64, 64, 4, 3, 32),),
}
# Blackwell, as above: with 4 warps the tile spills where D is not divisible by 16.
_TF32_100 = _TF32 | {"gradient_covariance": (Tile(None, 64, 64, 8, 3, 32),)}
_FP32 = {
    "product": (Tile(256, 32, 32, 4, 3, 16), Tile(None, 64, 64, 4, 3, 16)),
    "gradient_resident": (
        Tile(16, 16, 16, 1, 2, 16),
        Tile(32, 32, 16, 1, 2, 16),
        Tile(64, 64, 16, 4, 2, 16),
        Tile(128, 128, 16, 4, 3, 16),
        Tile(256, 256, 16, 8, 3, 16),
    ),
    "gradient_parked": (Tile(None, 128, 32, 8, 3, 16),),
    # 64 × 64 spills with 8 warps and takes 255 registers with 4.
    "gradient_covariance": (Tile(None, 64, 32, 4, 3, 16),),
}

_TABLE: dict[tuple[str, int, str], tuple[Tile, ...]] = {}
for _arch in ARCHITECTURES:
    _tf32, _half = (_TF32_100, _HALF_100) if _arch == 100 else (_TF32, _HALF)
    for _product, _rows in (("fp32", _FP32), ("tf32", _tf32), ("bf16", _half), ("fp16", _half)):
        _TABLE["standardize_resident", _arch, _product] = _STANDARDIZE_RESIDENT
        _TABLE["standardize_stream", _arch, _product] = _STANDARDIZE_STREAM
        for _kernel, _tiles in _rows.items():
            _TABLE[_kernel, _arch, _product] = _tiles

#: Kernels of the table.
KERNELS = tuple(sorted({kernel for kernel, _, _ in _TABLE}))


def nearest(arch: int) -> int:
    """The architecture whose rows ``arch`` takes."""
    return max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])


def tiles(kernel: str, arch: int, product: str) -> tuple[Tile, ...]:
    """All tiles of a kernel on one architecture, smallest first."""
    return _TABLE[kernel, nearest(arch), product]


def lookup(kernel: str, arch: int, product: str, size: int) -> Tile | None:
    """The first tile that takes ``size``, or None if it is above every limit."""
    for tile in tiles(kernel, arch, product):
        if tile.limit is None or size <= tile.limit:
            return tile
    return None


def splits(arch: int, tiles: int, steps: int) -> int:
    """Into how many parts (1, 2, 4 or 8) a contraction of ``steps`` steps is cut so that ``tiles`` tiles fill the GPU.

    Two steps a part at least, and eight parts at most: one program adds the parts of a tile.
    """
    parts = 1
    while parts < 8 and tiles * parts < _PROCESSORS[nearest(arch)] and steps >= 4 * parts:
        parts *= 2
    return parts


def groups(arch: int, blocks: int, row_tiles: int) -> int:
    """Over how many programs the ``row_tiles`` row tiles of each of ``blocks`` column blocks are dealt out."""
    return min(row_tiles, -(-2 * _PROCESSORS[nearest(arch)] // blocks))
