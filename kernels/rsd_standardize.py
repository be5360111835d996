"""RSD, launch 1: both inputs standardised, with the constants of each column.

    z = (x − mean) · inv        inv = 1 / (std + ε), ratio = (std + ε) / std, 0 where std = 0       eps_mode "std"
                                inv = 1 / √(var + ε), ratio = 1                                     eps_mode "var"
    p_j = Σᵢ S_ij T_ij / N      in fp32, before S and T are rounded to the product dtype

A program owns whole columns of both inputs, so nothing depends on the order in which programs run. The mean is kept as
hi + lo (mean of x, then the mean of x − hi): with column means of 1e5 standard deviations one fp32 mean loses three
digits of the gradient.

Matrices between launches have a leading dimension ``ld``, D rounded up to 16 with zeros in the padding, so that loads
are vectors also for D = 1000. Sides are counted teacher = 0, student = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["standardize_resident", "standardize_stream"]


@triton.jit
def _finish(total_lo, squares, n, eps, VARIANCE: tl.constexpr):
    """(lo, inv, ratio) from the sums of (x − hi) and (x − hi)²; IEEE division and root, the fast ones cost 2 ulp."""
    count = tl.zeros_like(squares) + n
    one = tl.zeros_like(squares) + 1.0
    lo = tl.math.div_rn(total_lo, count)
    variance = tl.math.div_rn(squares, count) - lo * lo
    variance = tl.where(variance < 0.0, 0.0, variance)  # rounding; NaN compares false and stays
    if VARIANCE:
        return lo, tl.math.div_rn(one, tl.math.sqrt_rn(variance + eps)), one
    std = tl.math.sqrt_rn(variance)
    inv = tl.math.div_rn(one, std + eps)
    # The divisor is replaced where std = 0: the other branch of where() is computed too.
    ratio = tl.where(std == 0.0, 0.0, tl.math.div_rn(std + eps, tl.where(std == 0.0, 1.0, std)))
    return lo, inv, ratio


@triton.jit
def _standardize_tile(x, mask, n, eps, VARIANCE: tl.constexpr):
    """(z, inv, ratio) of a tile with all rows. The mean is kept as hi + lo: one fp32 mean is rounded."""
    x = x.to(tl.float32)
    hi = tl.sum(x, 0) / n
    x = tl.where(mask, x - hi[None, :], 0.0)
    lo, inv, ratio = _finish(tl.sum(x, 0), tl.sum(x * x, 0), n, eps, VARIANCE)
    return tl.where(mask, (x - lo[None, :]) * inv[None, :], 0.0), inv, ratio


@triton.jit
def _zero(counter_ptr, counters):
    """Zeroes the counters of the later launches: no memset launch."""
    lane = tl.arange(0, 128)
    for first in range(tl.program_id(0) * 128, counters, tl.num_programs(0) * 128):
        tl.store(counter_ptr + first + lane, tl.zeros([128], tl.int32), mask=first + lane < counters)


@triton.jit(do_not_specialize=["counters", "n"])
def standardize_resident(
    s_ptr,  # [N, D] any strides
    t_ptr,  # [N, D] any strides
    z_ptr,  # [2, N, ld] product dtype: T, then S
    aux_ptr,  # [5, ld] fp32: inv_t, inv_s, ratio_t, ratio_s, p
    counter_ptr,  # [counters] int32
    counters,
    n,
    d,
    ld,
    plane,  # N · ld
    s_row,
    s_col,
    t_row,
    t_col,
    eps,
    STUDENT: tl.constexpr,  # False: the teacher alone, without p
    VARIANCE: tl.constexpr,  # eps_mode "var"
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All N ≤ ROWS rows of COLUMNS columns of both inputs in registers: each is read once."""
    _zero(counter_ptr, counters)
    # 64-bit offsets: N·D of a legal tensor can pass 2^31 elements.
    row = tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column.to(tl.int64)[None, :]
    mask = (row < n) & (column < d)[None, :]
    padded = (row < n) & (column < ld)[None, :]
    inside = column < ld
    at = row * ld + wide
    # Both loads before the first reduction: the second does not wait for the statistics of the first.
    t = tl.load(t_ptr + row * t_row + wide * t_col, mask=mask, other=0.0)
    if STUDENT:
        s = tl.load(s_ptr + row * s_row + wide * s_col, mask=mask, other=0.0)
    t, inv, ratio = _standardize_tile(t, mask, n, eps, VARIANCE)
    tl.store(z_ptr + at, t.to(z_ptr.dtype.element_ty), mask=padded)
    tl.store(aux_ptr + column, inv, mask=inside)
    tl.store(aux_ptr + 2 * ld + column, ratio, mask=inside)
    if STUDENT:
        s, inv, ratio = _standardize_tile(s, mask, n, eps, VARIANCE)
        tl.store(z_ptr + plane + at, s.to(z_ptr.dtype.element_ty), mask=padded)
        tl.store(aux_ptr + ld + column, inv, mask=inside)
        tl.store(aux_ptr + 3 * ld + column, ratio, mask=inside)
        tl.store(aux_ptr + 4 * ld + column, tl.sum(s * t, 0) / n, mask=inside)


@triton.jit
def _stream_statistics(x_ptr, x_row, row, inside, n, eps, VARIANCE: tl.constexpr, ROWS: tl.constexpr):
    """(hi, lo, inv, ratio) of columns of any length; every lane keeps its own partial sum until the end."""
    total = tl.zeros([ROWS, inside.shape[0]], tl.float32)
    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        total += tl.load(x_ptr + rows * x_row, mask=mask, other=0.0).to(tl.float32)
    hi = tl.sum(total, 0) / n
    total = tl.zeros([ROWS, inside.shape[0]], tl.float32)
    squares = tl.zeros([ROWS, inside.shape[0]], tl.float32)
    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        x = tl.load(x_ptr + rows * x_row, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - hi[None, :], 0.0)
        total += x
        squares += x * x
    lo, inv, ratio = _finish(tl.sum(total, 0), tl.sum(squares, 0), n, eps, VARIANCE)
    return hi, lo, inv, ratio


@triton.jit(do_not_specialize=["counters", "n"])
def standardize_stream(
    s_ptr,
    t_ptr,
    z_ptr,
    aux_ptr,
    counter_ptr,
    counters,
    n,
    d,
    ld,
    plane,
    s_row,
    s_col,
    t_row,
    t_col,
    eps,
    STUDENT: tl.constexpr,
    VARIANCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """:func:`standardize_resident` for columns of any length, ROWS rows at a time, from L2 after the first pass."""
    _zero(counter_ptr, counters)
    row = tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wide = column.to(tl.int64)[None, :]
    inside = column < d
    padded = column < ld
    t_columns = t_ptr + wide * t_col
    hi_t, lo_t, inv_t, ratio_t = _stream_statistics(t_columns, t_row, row, inside, n, eps, VARIANCE, ROWS)
    tl.store(aux_ptr + column, inv_t, mask=padded)
    tl.store(aux_ptr + 2 * ld + column, ratio_t, mask=padded)
    if STUDENT:
        s_columns = s_ptr + wide * s_col
        hi_s, lo_s, inv_s, ratio_s = _stream_statistics(s_columns, s_row, row, inside, n, eps, VARIANCE, ROWS)
        tl.store(aux_ptr + ld + column, inv_s, mask=padded)
        tl.store(aux_ptr + 3 * ld + column, ratio_s, mask=padded)
        dots = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        store = (rows < n) & padded[None, :]
        t = tl.load(t_columns + rows * t_row, mask=mask, other=0.0).to(tl.float32)
        t = tl.where(mask, ((t - hi_t[None, :]) - lo_t[None, :]) * inv_t[None, :], 0.0)
        tl.store(z_ptr + rows * ld + wide, t.to(z_ptr.dtype.element_ty), mask=store)
        if STUDENT:
            s = tl.load(s_columns + rows * s_row, mask=mask, other=0.0).to(tl.float32)
            s = tl.where(mask, ((s - hi_s[None, :]) - lo_s[None, :]) * inv_s[None, :], 0.0)
            tl.store(z_ptr + plane + rows * ld + wide, s.to(z_ptr.dtype.element_ty), mask=store)
            dots += s * t
    if STUDENT:
        tl.store(aux_ptr + 4 * ld + column, tl.sum(dots, 0) / n, mask=padded)
