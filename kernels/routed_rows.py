"""Device helpers of the routed kernels: which row of x a compact row is, which tile comes next, activations.

A routed layer works on the rows of the listed units only. Row m < M = count · rows_per_unit of a compact buffer stands
for row ``index[m // rows_per_unit] · rows_per_unit + m % rows_per_unit`` of x. M is read on the device, so the grid
cannot depend on it: a fixed number of programs walks over the tiles there are. Neither ``index`` from count on nor
compact rows from M on are ever read: they may hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "activation_gradient", "grouped", "load_normalized", "rows_of"]


@triton.jit
def rows_of(index_ptr, m, inside, rows_per_unit):
    """(unit, row of x as int64) of compact rows m; row 0 of unit 0 where not inside."""
    unit = tl.load(index_ptr + m // rows_per_unit, mask=inside, other=0)
    row = unit.to(tl.int64) * rows_per_unit + m % rows_per_unit
    return unit, tl.where(inside, row, 0)


@triton.jit
def grouped(
    tile, num_m, num_n,
    GROUP: tl.constexpr,
):  # fmt: skip
    """(row tile, column tile): GROUP row tiles are gone through column by column, so that both operands stay in L2."""
    size = GROUP * num_n
    first = (tile // size) * GROUP
    rows = tl.minimum(num_m - first, GROUP)
    return first + (tile % size) % rows, (tile % size) // rows


@triton.jit
def load_normalized(
    x_ptr, at, scale_ptr, shift_ptr, mean, rstd, channel, inside, inside_channel,
    RMS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """norm(x) [rows, channels] in fp32. Zero where not inside, but for the shift: whoever multiplies has zeros in the
    other factor there, or never uses the row."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        x -= mean[:, None]
    x *= rstd[:, None]
    if SCALE:
        scale = tl.load(scale_ptr + channel, mask=inside_channel, other=0.0).to(tl.float32)
        x *= scale[None, :]
    if SHIFT:
        shift = tl.load(shift_ptr + channel, mask=inside_channel, other=0.0).to(tl.float32)
        x += shift[None, :]
    return x


@triton.jit
def activate(
    x,
    ACT: tl.constexpr,
):  # fmt: skip
    """ACT of one fp32 pre-activation; swiglu's is silu, of its first half."""
    if ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif ACT == "silu" or ACT == "swiglu":
        return x * tl.sigmoid(x)
    elif ACT == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # NaN stays
    else:
        return x


@triton.jit
def activation_gradient(
    x,
    ACT: tl.constexpr,
):  # fmt: skip
    """dACT/dx at one fp32 pre-activation; swiglu's is silu's."""
    if ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == "silu" or ACT == "swiglu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)
