"""Routed layers, passes over rows: LayerNorm or RMSNorm and its backward, the residual and its backward.

    norm_rows          y[m] = norm(x[row(m)]) and/or (μ, ρ) of the row, ρ = 1 / √(variance + ε): two passes, no cancellation
    moments            (Σ x, Σ x²) of every row of x, as ``routed_forward.linear_residual`` carries them on
    residual           x[row(m)] += g y[m]
    norm_backward      with x̂ = (x − μ) ρ and w = dy γ:   dx[row(m)] = ρ (w − mean(w) − x̂ mean(w x̂));
                       RMSNorm: no μ and no mean(w); no norm: dx[row(m)] = dy[m]
    residual_backward  dy[m] = g dout[row(m)],  dot[m] = <y[m], dout[row(m)]>
    gate_rows          dot[m] = Σ parts[m] + <dout[row(m)], bias>
    gate_units         dgate[unit] = Σ dot[m] over the unit's rows, in a fixed order

A program takes ROWS rows at a time and walks over their channels by COLUMNS; what it reads again is in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .routed_rows import load_normalized, rows_of

__all__ = [
    "gate_rows_kernel",
    "gate_units_kernel",
    "moments_kernel",
    "norm_backward_kernel",
    "norm_rows_kernel",
    "residual_backward_kernel",
    "residual_kernel",
]


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr"])
def norm_rows_kernel(
    x_ptr,  # [R, D], rows contiguous
    scale_ptr,  # γ [D]
    shift_ptr,  # β [D]
    index_ptr,
    count_ptr,
    y_ptr,  # [capacity, D], if STORE
    statistics_ptr,  # [capacity, 2] fp32 (μ, ρ), if STATISTICS
    rows_per_unit,
    columns,
    x_row,
    y_row,
    eps,
    NORM: tl.constexpr,  # False: a gather
    RMS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    STORE: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        inside = m < total
        _, row = rows_of(index_ptr, m, inside, rows_per_unit)
        x_at = row[:, None] * x_row
        mean = tl.zeros([ROWS], tl.float32)
        rstd = tl.full([ROWS], 1.0, tl.float32)
        if NORM:
            if not RMS:
                total_x = tl.zeros([ROWS, COLUMNS], tl.float32)
                for first in range(0, columns, COLUMNS):
                    n = first + tl.arange(0, COLUMNS)
                    mask = inside[:, None] & (n < columns)[None, :]
                    total_x += tl.load(x_ptr + (x_at + n[None, :]), mask=mask, other=0.0).to(tl.float32)
                mean = tl.sum(total_x, 1) / columns
            squares = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, columns, COLUMNS):
                n = first + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (n < columns)[None, :]
                x = tl.load(x_ptr + (x_at + n[None, :]), mask=mask, other=0.0).to(tl.float32)
                x = tl.where(mask, x - mean[:, None], 0.0)
                squares += x * x
            rstd = tl.rsqrt(tl.sum(squares, 1) / columns + eps)
        if STATISTICS:
            tl.store(statistics_ptr + m.to(tl.int64) * 2, mean, mask=inside)
            tl.store(statistics_ptr + m.to(tl.int64) * 2 + 1, rstd, mask=inside)
        if STORE:
            y_at = m.to(tl.int64)[:, None] * y_row
            for first in range(0, columns, COLUMNS):
                n = first + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (n < columns)[None, :]
                if NORM:
                    y = load_normalized(
                        x_ptr, x_at + n[None, :], scale_ptr, shift_ptr, mean, rstd, n, mask, n < columns, RMS,
                        SCALE, SHIFT,
                    )  # fmt: skip
                else:
                    y = tl.load(x_ptr + (x_at + n[None, :]), mask=mask, other=0.0)
                tl.store(y_ptr + (y_at + n[None, :]), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "parts"])
def moments_kernel(
    x_ptr,  # [R, D], rows contiguous
    statistics_ptr,  # [R, parts, 2] fp32: the sums of the row in part 0, zeros in the others
    rows,
    columns,
    parts,
    x_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, columns, COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (n < columns)[None, :]
            x = tl.load(x_ptr + (row[:, None] * x_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            total += x
            squares += x * x
        sums = tl.sum(total, 1)[:, None]
        sums_of_squares = tl.sum(squares, 1)[:, None]
        for first_part in range(0, parts, 8):
            part = first_part + tl.arange(0, 8)
            at = statistics_ptr + (row[:, None] * parts + part[None, :]) * 2
            mask = inside[:, None] & (part < parts)[None, :]
            tl.store(at, tl.where((part == 0)[None, :], sums, 0.0), mask=mask)
            tl.store(at + 1, tl.where((part == 0)[None, :], sums_of_squares, 0.0), mask=mask)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"])
def residual_kernel(
    x_ptr,  # [R, D], rows contiguous; updated in place
    y_ptr,  # [capacity, D], rows contiguous
    gate_ptr,  # [U] fp32
    index_ptr,
    count_ptr,
    rows_per_unit,
    columns,
    x_row,
    y_row,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        inside = m < total
        unit, row = rows_of(index_ptr, m, inside, rows_per_unit)
        for first in range(0, columns, COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (n < columns)[None, :]
            y = tl.load(y_ptr + (m.to(tl.int64)[:, None] * y_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            if GATE:
                y *= tl.load(gate_ptr + unit, mask=inside, other=0.0)[:, None]
            x_at = x_ptr + (row[:, None] * x_row + n[None, :])
            new = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + y
            tl.store(x_at, new.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr"])
def norm_backward_kernel(
    dy_ptr,  # [capacity, D], rows contiguous
    x_ptr,  # [R, D], rows contiguous
    statistics_ptr,  # [capacity, 2] fp32 (μ, ρ)
    scale_ptr,  # γ [D]
    index_ptr,
    count_ptr,
    dx_ptr,  # [R, D], rows contiguous; only listed rows are written
    rows_per_unit,
    columns,
    dy_row,
    x_row,
    dx_row,
    NORM: tl.constexpr,
    RMS: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        inside = m < total
        _, row = rows_of(index_ptr, m, inside, rows_per_unit)
        dy_at = m.to(tl.int64)[:, None] * dy_row
        x_at = row[:, None] * x_row
        mean = tl.zeros([ROWS], tl.float32)
        rstd = tl.zeros([ROWS], tl.float32)
        along = tl.zeros([ROWS], tl.float32)
        level = tl.zeros([ROWS], tl.float32)
        if NORM:
            mean = tl.load(statistics_ptr + m.to(tl.int64) * 2, mask=inside, other=0.0)
            rstd = tl.load(statistics_ptr + m.to(tl.int64) * 2 + 1, mask=inside, other=0.0)
            dots = tl.zeros([ROWS, COLUMNS], tl.float32)
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, columns, COLUMNS):
                n = first + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (n < columns)[None, :]
                w = tl.load(dy_ptr + (dy_at + n[None, :]), mask=mask, other=0.0).to(tl.float32)
                if SCALE:
                    w *= tl.load(scale_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
                x = load_normalized(
                    x_ptr, x_at + n[None, :], scale_ptr, scale_ptr, mean, rstd, n, mask, n < columns, RMS, False,
                    False,
                )  # fmt: skip
                dots += w * x
                sums += w
            along = tl.sum(dots, 1) / columns
            if not RMS:
                level = tl.sum(sums, 1) / columns
        for first in range(0, columns, COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (n < columns)[None, :]
            w = tl.load(dy_ptr + (dy_at + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            if NORM:
                if SCALE:
                    w *= tl.load(scale_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
                x = load_normalized(
                    x_ptr, x_at + n[None, :], scale_ptr, scale_ptr, mean, rstd, n, mask, n < columns, RMS, False,
                    False,
                )  # fmt: skip
                w = rstd[:, None] * (w - level[:, None] - x * along[:, None])
            tl.store(dx_ptr + (row[:, None] * dx_row + n[None, :]), w.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr", "gate_ptr"])
def residual_backward_kernel(
    dout_ptr,  # [R, D], rows contiguous
    y_ptr,  # [capacity, D], rows contiguous
    gate_ptr,  # [U] fp32
    index_ptr,
    count_ptr,
    dy_ptr,  # [capacity, D], if STORE
    dot_ptr,  # [capacity] fp32, if DOT
    rows_per_unit,
    columns,
    dout_row,
    y_row,
    dy_row,
    GATE: tl.constexpr,
    STORE: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        inside = m < total
        unit, row = rows_of(index_ptr, m, inside, rows_per_unit)
        gate = tl.full([ROWS], 1.0, tl.float32)
        if GATE:
            gate = tl.load(gate_ptr + unit, mask=inside, other=0.0)
        dots = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, columns, COLUMNS):
            n = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (n < columns)[None, :]
            d = tl.load(dout_ptr + (row[:, None] * dout_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            at = m.to(tl.int64)[:, None]
            if DOT:
                dots += d * tl.load(y_ptr + (at * y_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
            if STORE:
                d *= gate[:, None]
                tl.store(dy_ptr + (at * dy_row + n[None, :]), d.to(dy_ptr.dtype.element_ty), mask=mask)
        if DOT:
            tl.store(dot_ptr + m, tl.sum(dots, 1), mask=inside)


@triton.jit(do_not_specialize=["rows_per_unit", "parts"], do_not_specialize_on_alignment=["index_ptr", "count_ptr"])
def gate_rows_kernel(
    dout_ptr,  # [R, D], rows contiguous; read if BIAS
    bias_ptr,  # [D] fp32
    parts_ptr,  # [capacity, parts] fp32
    index_ptr,
    count_ptr,
    dot_ptr,  # [capacity] fp32
    rows_per_unit,
    columns,
    parts,
    dout_row,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (programs,), any number."""
    total = tl.load(count_ptr) * rows_per_unit
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        m = tile * ROWS + tl.arange(0, ROWS)
        inside = m < total
        dot = tl.zeros([ROWS], tl.float32)
        for first in range(0, parts, 8):
            part = first + tl.arange(0, 8)
            mask = inside[:, None] & (part < parts)[None, :]
            dot += tl.sum(tl.load(parts_ptr + (m.to(tl.int64)[:, None] * parts + part), mask=mask, other=0.0), 1)
        if BIAS:
            _, row = rows_of(index_ptr, m, inside, rows_per_unit)
            dots = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, columns, COLUMNS):
                n = first + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (n < columns)[None, :]
                d = tl.load(dout_ptr + (row[:, None] * dout_row + n[None, :]), mask=mask, other=0.0).to(tl.float32)
                dots += d * tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
            dot += tl.sum(dots, 1)
        tl.store(dot_ptr + m, dot, mask=inside)


@triton.jit(do_not_specialize=["rows_per_unit"], do_not_specialize_on_alignment=["index_ptr", "count_ptr"])
def gate_units_kernel(
    dot_ptr,  # [capacity] fp32
    index_ptr,
    count_ptr,
    dgate_ptr,  # [U] fp32; only listed units are written
    rows_per_unit,
    ROWS: tl.constexpr,  # units of a program
    COLUMNS: tl.constexpr,  # rows of a unit at a time
):
    """Grid: (⌈U / ROWS⌉,)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = i < tl.load(count_ptr)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows_per_unit, COLUMNS):
        t = first + tl.arange(0, COLUMNS)
        at = i.to(tl.int64)[:, None] * rows_per_unit + t[None, :]
        total += tl.load(dot_ptr + at, mask=inside[:, None] & (t < rows_per_unit)[None, :], other=0.0)
    unit = tl.load(index_ptr + i, mask=inside, other=0)
    tl.store(dgate_ptr + unit, tl.sum(total, 1), mask=inside)
