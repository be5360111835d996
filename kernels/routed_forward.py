"""Routed layers, forward products: norm → linear → activation into compact rows, and linear → gate → residual into x.

    norm_linear      out[m] = act(norm(x[row(m)]) Wᵀ + b)
    linear_residual  x[row(m)] += g · (h[m] Wᵀ + b)

Both are persistent over the tiles of the M compact rows there are (``routed_rows.py``). The norm is done in one of two ways:

* NORM = "fold" (inference). With W' = W · γ, c₁ = row sums of W' as rounded, c₂ = W β + b, mean μ and 1/std ρ of the row,

      norm(x) Wᵀ + b = ρ (x W'ᵀ − μ c₁) + c₂

  so the main loop multiplies raw rows of x. μ and ρ come from Σ x and Σ x² of the row, which **travel with the residual
  stream**: linear_residual writes them for the rows it changes, and a row that a layer skips keeps its own. The variance
  is E[x²] − μ² in fp32: at a mean of 100 standard deviations it has 3 digits left.
* NORM = "load" (training): x is normalised on its way into the product, from (μ, ρ) of the row as
  ``routed_norm.norm_rows`` computes them, without cancellation.

linear_residual: every element of x has one owner, so there are no atomics and the same input gives the same bits. Its
statistics are [R, parts, 2], (Σ x, Σ x²) over PART columns each; a tile wider than PART writes its sum into the first of
its parts and zeros into the others, so tiles of any width share one buffer. Whoever reads adds all parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routed_rows import activate, grouped, load_normalized, rows_of

__all__ = ["linear_residual_kernel", "norm_linear_kernel"]


@triton.jit
def _carried(
    statistics_ptr, row, inside, parts, size, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(mean, 1/std) of rows from their partial sums."""
    total = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, parts, 8):  # 8 parts at once: all of a wide row would not fit beside the accumulators
        part = first + tl.arange(0, 8)
        at = (row[:, None] * parts + part[None, :]) * 2
        mask = inside[:, None] & (part < parts)[None, :]
        total += tl.sum(tl.load(statistics_ptr + at, mask=mask, other=0.0), 1)
        squares += tl.sum(tl.load(statistics_ptr + at + 1, mask=mask, other=0.0), 1)
    mean = total / size
    variance = squares / size
    if not RMS:
        variance = tl.maximum(variance - mean * mean, 0.0)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def _finish(
    acc, n, inside_n, bias_ptr, sums_ptr, mean, rstd,
    NORM: tl.constexpr, RMS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The pre-activation from an accumulator: fold's correction, and the bias."""
    if NORM == "fold":
        if not RMS:
            acc -= mean[:, None] * tl.load(sums_ptr + n, mask=inside_n, other=0.0)[None, :]
        acc *= rstd[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows_per_unit", "parts"], do_not_specialize_on_alignment=["index_ptr", "count_ptr"])
def norm_linear_kernel(
    x_ptr,  # [R, K], rows contiguous
    weight_ptr,  # [F or 2F, K]
    bias_ptr,  # [F or 2F] fp32; c₂ if folded
    sums_ptr,  # [F or 2F] fp32: c₁, folded LayerNorm only
    scale_ptr,  # γ [K], "load" only
    shift_ptr,  # β [K], "load" only
    statistics_ptr,  # "fold": [R, parts, 2] sums; "load": [capacity, 2] mean, 1/std
    index_ptr,
    count_ptr,
    out_ptr,  # [capacity, F]
    pre_ptr,  # [capacity, F or 2F], if PRE: what ACT was applied to
    rows_per_unit,
    depth,  # K
    columns,  # F
    parts,
    x_row,
    out_row,
    pre_row,
    eps,
    NORM: tl.constexpr,  # "none", "fold", "load"
    RMS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    PRE: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of DEPTH
    PRODUCT: tl.constexpr,  # dtype of the factors
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: (programs,), any number."""
    PAIR: tl.constexpr = ACT == "swiglu"  # two products share the rows of x: the gate's and the up-projection's
    total = tl.load(count_ptr) * rows_per_unit
    num_m = tl.cdiv(total, ROWS)
    num_n = tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = grouped(tile, num_m, num_n, GROUP)
        m = tile_m * ROWS + tl.arange(0, ROWS)
        n = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        inside_m = m < total
        inside_n = n < columns
        _, row = rows_of(index_ptr, m, inside_m, rows_per_unit)
        lane = tl.arange(0, DEPTH)
        x_at = row[:, None] * x_row + lane[None, :]
        w_at = n.to(tl.int64)[None, :] * depth + lane[:, None]
        mean = tl.zeros([ROWS], tl.float32)
        rstd = tl.zeros([ROWS], tl.float32)
        if NORM == "load":
            mean = tl.load(statistics_ptr + m.to(tl.int64) * 2, mask=inside_m, other=0.0)
            rstd = tl.load(statistics_ptr + m.to(tl.int64) * 2 + 1, mask=inside_m, other=0.0)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if PAIR:
            up = tl.zeros([ROWS, COLUMNS], tl.float32)
            up_at = (n + columns).to(tl.int64)[None, :] * depth + lane[:, None]
        for first in range(0, depth, DEPTH):
            k = first + lane
            inside_k = k < depth
            if EVEN:
                mask_x = inside_m[:, None]
                mask_w = inside_n[None, :]
            else:
                mask_x = inside_m[:, None] & inside_k[None, :]
                mask_w = inside_n[None, :] & inside_k[:, None]
            if NORM == "load":
                x = load_normalized(
                    x_ptr, x_at + first, scale_ptr, shift_ptr, mean, rstd, k, mask_x, inside_k, RMS, SCALE, SHIFT
                )  # fmt: skip
            else:
                x = tl.load(x_ptr + (x_at + first), mask=mask_x, other=0.0)
            x = x.to(PRODUCT)
            w = tl.load(weight_ptr + (w_at + first), mask=mask_w, other=0.0).to(PRODUCT)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            if PAIR:
                w = tl.load(weight_ptr + (up_at + first), mask=mask_w, other=0.0).to(PRODUCT)
                up = tl.dot(x, w, up, input_precision=PRECISION)
        if NORM == "fold":
            mean, rstd = _carried(statistics_ptr, row, inside_m, parts, depth, eps, RMS, ROWS)
        mask = inside_m[:, None] & inside_n[None, :]
        acc = _finish(acc, n, inside_n, bias_ptr, sums_ptr, mean, rstd, NORM, RMS, BIAS)
        pre_at = m.to(tl.int64)[:, None] * pre_row + n[None, :]
        if PRE:
            tl.store(pre_ptr + pre_at, acc.to(pre_ptr.dtype.element_ty), mask=mask)
        acc = activate(acc, ACT)
        if PAIR:
            up = _finish(up, n, inside_n, bias_ptr + columns, sums_ptr + columns, mean, rstd, NORM, RMS, BIAS)
            if PRE:
                tl.store(pre_ptr + (pre_at + columns), up.to(pre_ptr.dtype.element_ty), mask=mask)
            acc *= up
        out_at = m.to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows_per_unit", "parts"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"]
)
def linear_residual_kernel(
    x_ptr,  # [R, F], rows contiguous; updated in place
    h_ptr,  # [capacity, K], rows contiguous
    weight_ptr,  # [F, K]
    bias_ptr,  # [F] fp32
    gate_ptr,  # [U] fp32
    statistics_ptr,  # [R, parts, 2] fp32, if EMIT
    index_ptr,
    count_ptr,
    rows_per_unit,
    depth,  # K
    columns,  # F, the width of x
    parts,
    x_row,
    h_row,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    EMIT: tl.constexpr,
    EVEN: tl.constexpr,
    PART: tl.constexpr,  # columns of a part; divides COLUMNS
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    num_m = tl.cdiv(total, ROWS)
    num_n = tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, tile_n = grouped(tile, num_m, num_n, GROUP)
        m = tile_m * ROWS + tl.arange(0, ROWS)
        n = tile_n * COLUMNS + tl.arange(0, COLUMNS)
        inside_m = m < total
        inside_n = n < columns
        lane = tl.arange(0, DEPTH)
        h_at = m.to(tl.int64)[:, None] * h_row + lane[None, :]
        w_at = n.to(tl.int64)[None, :] * depth + lane[:, None]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, depth, DEPTH):
            if EVEN:
                mask_h = inside_m[:, None]
                mask_w = inside_n[None, :]
            else:
                inside_k = first + lane < depth
                mask_h = inside_m[:, None] & inside_k[None, :]
                mask_w = inside_n[None, :] & inside_k[:, None]
            h = tl.load(h_ptr + (h_at + first), mask=mask_h, other=0.0).to(PRODUCT)
            w = tl.load(weight_ptr + (w_at + first), mask=mask_w, other=0.0).to(PRODUCT)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        unit, row = rows_of(index_ptr, m, inside_m, rows_per_unit)
        if GATE:
            acc *= tl.load(gate_ptr + unit, mask=inside_m, other=0.0)[:, None]
        x_at = x_ptr + (row[:, None] * x_row + n[None, :])
        mask = inside_m[:, None] & inside_n[None, :]
        new = (tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + acc).to(x_ptr.dtype.element_ty)
        tl.store(x_at, new, mask=mask)
        if EMIT:
            kept = tl.where(mask, new.to(tl.float32), 0.0)  # of what was stored: the next layer multiplies that
            part = tl.arange(0, COLUMNS // PART)
            first_part = (part == 0)[None, :]
            part += tile_n * (COLUMNS // PART)
            s_at = statistics_ptr + (row[:, None] * parts + part[None, :]) * 2
            s_mask = inside_m[:, None] & (part < parts)[None, :]
            tl.store(s_at, tl.where(first_part, tl.sum(kept, 1)[:, None], 0.0), mask=s_mask)
            tl.store(s_at + 1, tl.where(first_part, tl.sum(kept * kept, 1)[:, None], 0.0), mask=s_mask)
