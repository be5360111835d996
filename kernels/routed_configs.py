"""Tiles of the routed kernels: one static table, as ``configs.py`` and for its reasons. No autotuning at run time.

What is chosen depends on shapes the host knows (the capacity, not the number of active rows), so a row's result does not
depend on which others are active. Changing a row here means running ``python -m xdfast.kernels.aot``.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import configs

__all__ = [
    "GROUP",
    "KERNELS",
    "PART",
    "PRODUCT_KERNELS",
    "RoutedTile",
    "lookup",
    "parts",
    "ragged_tile",
    "row_tile",
    "tiles",
]

#: Row tiles that are gone through column by column.
GROUP = 8
#: Columns of one part of the statistics that travel with the residual stream; divides the columns of every tile that
#: writes them.
PART = 64


@dataclass(frozen=True)
class RoutedTile(configs.Tile):
    """:class:`configs.Tile`, ``limit`` not used for products, and

    Attributes:
        deeper: taken for contractions longer than this.
        programs: programs per SM of the persistent grid.
    """

    deeper: int = 0
    programs: int = 1


def _tile(rows: int, columns: int, depth: int, warps: int, stages: int, programs: int, deeper: int = 0) -> RoutedTile:
    return RoutedTile(None, rows, columns, warps, stages, depth, deeper, programs)


# Large tiles first. A short contraction (D ≤ 512) leaves the tensor cores idle during the epilogue (erf: 25 instructions
# an element) unless another program on the SM multiplies meanwhile: 64 × 128, two or three programs. Small tiles are for
# few rows: one robot, one image.
_FEW = (_tile(64, 64, 64, 4, 3, 3), _tile(32, 64, 64, 4, 3, 4), _tile(16, 64, 64, 4, 3, 4))
# Two accumulators and rows normalised on the way: with steps of 64, one variant of 32 rows spills on H100 (Triton 3.8).
# On Blackwell it does without the normalisation, too.
_FEW_PAIR_LOAD = (_tile(32, 64, 32, 4, 3, 4), _FEW[2])
_HALF = {
    "norm_linear": (_tile(128, 128, 64, 8, 3, 1, 512), _tile(64, 128, 64, 8, 3, 2), *_FEW),
    "norm_linear_load": (_tile(64, 128, 64, 8, 3, 2), *_FEW),
    "norm_linear_pair": (_tile(64, 128, 64, 8, 3, 1), *_FEW),
    "norm_linear_pair_load": (_tile(64, 64, 64, 8, 3, 2), *_FEW_PAIR_LOAD),
    "linear_residual": (_tile(128, 128, 64, 8, 3, 1, 512), _tile(64, 128, 64, 8, 3, 2), *_FEW),
    "input_gradient": (_tile(128, 128, 64, 8, 3, 1, 512), _tile(64, 128, 64, 8, 3, 2), *_FEW),
    "weight_gradient": (_tile(128, 128, 64, 8, 3, 1), _tile(64, 64, 64, 4, 3, 1)),
}
# A100: steps of 32 for 8 warps, with 64 the assembler aims at 128 registers and just misses.
_MIDDLE_80 = _tile(64, 128, 32, 8, 4, 2)
_HALF_80 = _HALF | {
    "norm_linear_pair": (_HALF["norm_linear_pair"][0], _tile(64, 64, 64, 8, 3, 2), *_FEW[1:]),
    "norm_linear": (_HALF["norm_linear"][0], _MIDDLE_80, *_FEW),
    "norm_linear_pair_load": (_tile(64, 64, 32, 8, 3, 2), *_FEW_PAIR_LOAD),
    "linear_residual": (_HALF["linear_residual"][0], _MIDDLE_80, *_FEW),
    "input_gradient": (_HALF["input_gradient"][0], _MIDDLE_80, *_FEW),
    "weight_gradient": (_tile(128, 128, 32, 8, 4, 1), _HALF["weight_gradient"][1]),
}
# Blackwell: the accumulator is in tensor memory, and the assembler aims at 128 registers and just misses.
_HALF_100 = _HALF | {
    "norm_linear": (*_HALF["norm_linear"][:2], _tile(64, 64, 64, 8, 3, 3), *_FEW[1:]),
    "norm_linear_pair": (_HALF["norm_linear_pair"][0], _FEW[0], *_FEW_PAIR_LOAD),
    "norm_linear_load": (_tile(64, 128, 64, 4, 3, 2), _tile(64, 64, 64, 8, 3, 3), *_FEW[1:]),
}
_FEW_TF32 = (_tile(64, 64, 32, 4, 3, 3), _tile(32, 64, 32, 4, 3, 4), _tile(16, 64, 32, 4, 3, 4))
_TF32 = {
    "norm_linear": (_tile(64, 128, 32, 8, 3, 2), *_FEW_TF32),
    "norm_linear_load": (_tile(64, 128, 32, 8, 3, 2), *_FEW_TF32),
    "norm_linear_pair": (_tile(64, 64, 32, 8, 3, 1), *_FEW_TF32[1:]),
    "norm_linear_pair_load": (_tile(64, 64, 32, 8, 3, 2), *_FEW_TF32[1:]),
    "linear_residual": (_tile(64, 128, 32, 8, 3, 2), *_FEW_TF32),
    "input_gradient": (_tile(64, 128, 32, 8, 3, 2), *_FEW_TF32),
    "weight_gradient": (_tile(64, 64, 32, 4, 3, 1),),
}
# Blackwell, again 128 registers just missed: one stage less.
_TF32_100 = _TF32 | {
    "linear_residual": (_tile(64, 128, 32, 8, 2, 2), _tile(64, 64, 32, 4, 2, 3), *_FEW_TF32[1:]),
}
# fp32, plain multiply-add: each the nearest that spills nothing on all three architectures.
_FEW_FP32 = (_tile(64, 64, 16, 8, 3, 2), _tile(32, 64, 16, 4, 3, 3), _tile(16, 64, 16, 4, 3, 4))
_32_ROWS, _16_ROWS = _tile(32, 64, 16, 4, 2, 3), _tile(16, 64, 32, 4, 2, 4)
_FP32 = {
    "norm_linear": (_FEW_FP32[0], _32_ROWS, _FEW_FP32[2]),
    "norm_linear_load": (*_FEW_FP32[:2], _16_ROWS),
    "norm_linear_pair": (_tile(32, 64, 16, 8, 3, 2), _16_ROWS),
    "norm_linear_pair_load": (_tile(32, 64, 16, 8, 3, 2), _16_ROWS),
    "linear_residual": (_FEW_FP32[0], _32_ROWS, _FEW_FP32[2]),
    "input_gradient": (_FEW_FP32[0], _32_ROWS, _FEW_FP32[2]),
    "weight_gradient": (_tile(64, 64, 16, 8, 3, 1),),
}

#: For shapes or strides not divisible by 16: rows that start anywhere are loaded element by element, past the pipeline,
#: and the addresses take the registers of a large tile.
_RAGGED = {"fp32": _tile(32, 64, 16, 4, 1, 4), "tf32": _tile(32, 64, 32, 4, 1, 4)}
_RAGGED |= dict.fromkeys(("bf16", "fp16"), _tile(32, 64, 32, 4, 1, 4))

# Passes over rows: 8 to 16 values a thread. The assembler aims at few registers for them and now and then just misses;
# what stands apart from the rest is the nearest that spills nothing on all three architectures.
_ROWS = (
    RoutedTile(256, 8, 256, 4, programs=8),
    RoutedTile(512, 4, 512, 4, programs=8),
    RoutedTile(None, 4, 1024, 8, programs=4),
)
_FEWER_ROWS = (
    RoutedTile(256, 4, 256, 4, programs=8),
    RoutedTile(512, 2, 512, 4, programs=8),
    RoutedTile(None, 2, 1024, 8, programs=8),
)
_PASSES = {
    **dict.fromkeys(("gate_rows", "norm_rows", "residual"), _ROWS),
    **dict.fromkeys(("moments", "residual_backward"), _FEWER_ROWS),
    "norm_backward": (_FEWER_ROWS[1], _ROWS[2]),
    "activation_backward": (RoutedTile(None, 8, 256, 4, programs=8),),
    "add_parts": (RoutedTile(None, 1, 1024, 4),),
    "column_sums": (RoutedTile(None, 32, 64, 4),),
    # Units of many rows, one a program; units of few rows, and tokens.
    "gate_units": (RoutedTile(32, 32, 32, 4), RoutedTile(None, 1, 256, 4)),
}

_TABLE: dict[tuple[str, int, str], tuple[RoutedTile, ...]] = {}
for _arch in configs.ARCHITECTURES:
    _half = {80: _HALF_80, 100: _HALF_100}.get(_arch, _HALF)
    _tf32 = _TF32_100 if _arch == 100 else _TF32
    for _product, _products in (("fp32", _FP32), ("tf32", _tf32), ("bf16", _half), ("fp16", _half)):
        for _kernel, _tiles in (_products | _PASSES).items():
            _TABLE[_kernel, _arch, _product] = _tiles

#: Kernels with a matrix product.
PRODUCT_KERNELS = tuple(_HALF)
#: All kernels of the table.
KERNELS = tuple(sorted({kernel for kernel, _, _ in _TABLE}))


def tiles(kernel: str, arch: int, product: str) -> tuple[RoutedTile, ...]:
    """All tiles of a kernel on one architecture: large to small for products, by limit for passes."""
    return _TABLE[kernel, configs.nearest(arch), product]


def lookup(kernel: str, arch: int, product: str, rows: int, columns: int, depth: int, processors: int) -> RoutedTile:
    """The largest tile of which an output [rows, columns] has enough to fill three quarters of the GPU, else the smallest."""
    found = [tile for tile in tiles(kernel, arch, product) if depth > tile.deeper]
    for tile in found:
        if 4 * -(-rows // tile.rows) * -(-columns // tile.columns) >= 3 * processors:
            return tile
    return found[-1]


def ragged_tile(kernel: str, product: str) -> RoutedTile:
    """The tile of a product whose sizes or row strides are not all divisible by 16."""
    if (kernel, product) == ("norm_linear_pair_load", "tf32"):
        return _tile(32, 32, 32, 4, 1, 4)
    return _RAGGED[product]


def row_tile(kernel: str, columns: int) -> RoutedTile:
    """The tile of a pass over rows of ``columns``; it does not depend on architecture or dtype."""
    found = _PASSES[kernel]
    return next((tile for tile in found if tile.limit is None or columns <= tile.limit), found[-1])


def parts(columns: int) -> int:
    """Parts of the statistics [R, parts, 2] of a residual stream of this width."""
    return -(-columns // PART)
