"""Routed layers, backward of the products. Everything is over the M compact rows there are (``routed_rows.py``).

    activation_backward  dpre[m] = act'(pre[m]) dout[m];   swiglu, out = silu(a) b:  (silu'(a) b dout, silu(a) dout)
    input_gradient       C = A[row(m) or m] W;   out[m] = g C[m],  parts[m, tile] = Σ C[m] h[m] over the tile's columns
    weight_gradient      parts[s] = Σ_m a(m) b(m)ᵀ over one of SPLITS stretches of the rows
    column_sums          parts[s] = Σ_m a(m), and with a norm Σ_m a(m) x̂(m), likewise
    add_parts            Σ_s parts[s], in the order of s

where a(m) is a compact row or g times a row of x's gradient, and b(m) a compact row or norm(x[row(m)]). For
``linear_residual``: dh by input_gradient (rows of dout, gate, h: the gate's gradient is Σ <h, dout W> + <dout, bias> over
the unit's rows), dweight from g dout[row] and h. For ``norm_linear``: dy = dpre W, then ``routed_norm.norm_backward``;
dweight from dpre and norm(x[row]), computed again; dγ = Σ dy x̂, dβ = Σ dy.

The stretches depend on M and the launch alone and their sums are added in order: no atomics, the same bits every time.
A launch writes zeros where there is no row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routed_rows import activate, activation_gradient, grouped, load_normalized, rows_of

__all__ = [
    "activation_backward_kernel",
    "add_parts_kernel",
    "column_sums_kernel",
    "input_gradient_kernel",
    "weight_gradient_kernel",
]


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["count_ptr"])
def activation_backward_kernel(
    dout_ptr,  # [capacity, F]
    pre_ptr,  # [capacity, F or 2F]
    count_ptr,
    dpre_ptr,  # [capacity, F or 2F]
    rows_per_unit,
    columns,  # F
    dout_row,
    pre_row,
    dpre_row,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs, column tiles), any number of programs."""
    total = tl.load(count_ptr) * rows_per_unit
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (m < total) & (n < columns)[None, :]
        dout = tl.load(dout_ptr + (m * dout_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        pre_at = pre_ptr + (m * pre_row + n[None, :])
        dpre_at = dpre_ptr + (m * dpre_row + n[None, :])
        pre = tl.load(pre_at, mask=mask, other=0.0).to(tl.float32)
        if ACT == "swiglu":
            up = tl.load(pre_at + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(dpre_at + columns, (dout * activate(pre, ACT)).to(dpre_ptr.dtype.element_ty), mask=mask)
            dout *= up
        dpre = dout * activation_gradient(pre, ACT)
        tl.store(dpre_at, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["rows_per_unit", "parts"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"]
)
def input_gradient_kernel(
    a_ptr,  # [R, K] if GATHER, else [capacity, K]; rows contiguous
    weight_ptr,  # [K, N]
    h_ptr,  # [capacity, N], if DOT
    gate_ptr,  # [U] fp32, if GATE
    index_ptr,
    count_ptr,
    out_ptr,  # [capacity, N], if STORE
    parts_ptr,  # [capacity, column tiles] fp32, if DOT
    rows_per_unit,
    depth,  # K
    columns,  # N
    parts,  # column tiles
    a_row,
    h_row,
    out_row,
    GATHER: tl.constexpr,
    GATE: tl.constexpr,
    DOT: tl.constexpr,
    STORE: tl.constexpr,
    EVEN: tl.constexpr,
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
        if GATHER or GATE:
            unit, row = rows_of(index_ptr, m, inside_m, rows_per_unit)
        if GATHER:
            a_at = row[:, None] * a_row + lane[None, :]
        else:
            a_at = m.to(tl.int64)[:, None] * a_row + lane[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, depth, DEPTH):
            k = first + lane
            if EVEN:
                mask_a = inside_m[:, None]
                mask_w = inside_n[None, :]
            else:
                mask_a = inside_m[:, None] & (k < depth)[None, :]
                mask_w = inside_n[None, :] & (k < depth)[:, None]
            a = tl.load(a_ptr + (a_at + first), mask=mask_a, other=0.0).to(PRODUCT)
            w_at = k.to(tl.int64)[:, None] * columns + n[None, :]
            w = tl.load(weight_ptr + w_at, mask=mask_w, other=0.0).to(PRODUCT)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        mask = inside_m[:, None] & inside_n[None, :]
        if DOT:
            h_at = m.to(tl.int64)[:, None] * h_row + n[None, :]
            h = tl.load(h_ptr + h_at, mask=mask, other=0.0).to(tl.float32)
            tl.store(parts_ptr + (m.to(tl.int64) * parts + tile_n), tl.sum(acc * h, 1), mask=inside_m)
        if STORE:
            if GATE:
                acc *= tl.load(gate_ptr + unit, mask=inside_m, other=0.0)[:, None]
            out_at = m.to(tl.int64)[:, None] * out_row + n[None, :]
            tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"])
def weight_gradient_kernel(
    a_ptr,  # [R, F] if GATHER_A, else [capacity, F]; rows contiguous
    b_ptr,  # [R, K] if GATHER_B, else [capacity, K]; rows contiguous
    gate_ptr,  # [U] fp32, if GATE: a is multiplied by it
    statistics_ptr,  # [capacity, 2] fp32 (μ, ρ), if NORM: b is normalised
    scale_ptr,  # γ [K]
    shift_ptr,  # β [K]
    index_ptr,
    count_ptr,
    parts_ptr,  # [SPLITS, F, K]
    rows_per_unit,
    rows,  # F
    columns,  # K
    a_row,
    b_row,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: (tiles of [F, K], SPLITS)."""
    total = tl.load(count_ptr) * rows_per_unit
    tile_i, tile_j = grouped(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    i = tile_i * ROWS + tl.arange(0, ROWS)
    j = tile_j * COLUMNS + tl.arange(0, COLUMNS)
    inside_i = i < rows
    inside_j = j < columns
    stretch = tl.cdiv(tl.cdiv(total, DEPTH), tl.num_programs(1)) * DEPTH
    start = tl.program_id(1) * stretch
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, tl.minimum(start + stretch, total), DEPTH):
        m = first + tl.arange(0, DEPTH)
        inside_m = m < total
        compact = m.to(tl.int64)
        if GATHER_A or GATHER_B or GATE:
            unit, row = rows_of(index_ptr, m, inside_m, rows_per_unit)
        row_a = row if GATHER_A else compact
        row_b = row if GATHER_B else compact
        a_at = i[:, None] + (row_a * a_row)[None, :]
        a = tl.load(a_ptr + a_at, mask=inside_i[:, None] & inside_m[None, :], other=0.0)
        if GATE:
            gate = tl.load(gate_ptr + unit, mask=inside_m, other=0.0)
            a = a.to(tl.float32) * gate[None, :]
        b_at = (row_b * b_row)[:, None] + j[None, :]
        mask_b = inside_m[:, None] & inside_j[None, :]
        if NORM:
            mean = tl.load(statistics_ptr + compact * 2, mask=inside_m, other=0.0)
            rstd = tl.load(statistics_ptr + compact * 2 + 1, mask=inside_m, other=0.0)
            b = load_normalized(
                b_ptr, b_at, scale_ptr, shift_ptr, mean, rstd, j, mask_b, inside_j, RMS, SCALE, SHIFT
            )  # fmt: skip
        else:
            b = tl.load(b_ptr + b_at, mask=mask_b, other=0.0)
        acc = tl.dot(a.to(PRODUCT), b.to(PRODUCT), acc, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * columns + j[None, :]
    mask = inside_i[:, None] & inside_j[None, :]
    tl.store(parts_ptr + at, acc.to(parts_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"])
def column_sums_kernel(
    a_ptr,  # [R, N] if GATHER, else [capacity, N]; rows contiguous
    x_ptr,  # [R, N], if NORM
    gate_ptr,  # [U] fp32, if GATE
    statistics_ptr,  # [capacity, 2] fp32 (μ, ρ), if NORM
    index_ptr,
    count_ptr,
    parts_ptr,  # [SPLITS, N] fp32, or [SPLITS, 2, N] if NORM: with x̂, then without
    rows_per_unit,
    columns,
    a_row,
    x_row,
    GATHER: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (column tiles, SPLITS)."""
    total = tl.load(count_ptr) * rows_per_unit
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside_n = n < columns
    stretch = tl.cdiv(tl.cdiv(total, ROWS), tl.num_programs(1)) * ROWS
    start = tl.program_id(1) * stretch
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    dots = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, tl.minimum(start + stretch, total), ROWS):
        m = first + tl.arange(0, ROWS)
        inside_m = m < total
        mask = inside_m[:, None] & inside_n[None, :]
        compact = m.to(tl.int64)
        if GATHER or GATE or NORM:
            unit, row = rows_of(index_ptr, m, inside_m, rows_per_unit)
        row_a = row if GATHER else compact
        a = tl.load(a_ptr + ((row_a * a_row)[:, None] + n[None, :]), mask=mask, other=0.0).to(tl.float32)
        if GATE:
            a *= tl.load(gate_ptr + unit, mask=inside_m, other=0.0)[:, None]
        sums += a
        if NORM:
            mean = tl.load(statistics_ptr + compact * 2, mask=inside_m, other=0.0)
            rstd = tl.load(statistics_ptr + compact * 2 + 1, mask=inside_m, other=0.0)
            dots += a * load_normalized(
                x_ptr, (row * x_row)[:, None] + n[None, :], x_ptr, x_ptr, mean, rstd, n, mask, inside_n, RMS, False,
                False,
            )  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    if NORM:
        tl.store(parts_ptr + (split * 2 * columns + n), tl.sum(dots, 0), mask=inside_n)
        tl.store(parts_ptr + (split * 2 + 1) * columns + n, tl.sum(sums, 0), mask=inside_n)
    else:
        tl.store(parts_ptr + (split * columns + n), tl.sum(sums, 0), mask=inside_n)


@triton.jit(do_not_specialize=["splits"])
def add_parts_kernel(
    parts_ptr,  # fp32; the parts of an element lie ``stride`` apart
    out_ptr,  # [size]
    size,
    stride,
    splits,
    COLUMNS: tl.constexpr,
):
    """Grid: (⌈size / COLUMNS⌉,)."""
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < size
    total = tl.zeros([COLUMNS], tl.float32)
    for _ in range(0, splits):
        total += tl.load(parts_ptr + at, mask=mask, other=0.0)
        parts_ptr += stride
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
