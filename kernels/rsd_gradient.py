"""RSD, launch 3: the loss and the gradients.

    U/N² = T (TᵀS) / N² = D/N² · K S = 1/N · T P        K = T Tᵀ / D, P = TᵀS / N from launch 2
    f_j  = Σᵢ S_ij (U/N²)_ij = Σ_k P_kj²
    c_j  = 2/N (p_j − 1 − κ p_j),   g_j = 2κ f_j / N + c_j p_j
    ∂L/∂s = inv_j (2κ (U/N²)_ij + c_j T_ij − ratio_j g_j S_ij)

and the same with s and t exchanged. Σ_j (p_j − 1)² and Σ_j (f_j − p_j²) are the parts of the loss; the covariance form
has f_j − p_j² as a sum of squares off the diagonal, without the subtraction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import arrive

__all__ = ["gradient_covariance", "gradient_parked", "gradient_resident"]


@triton.jit
def _constants(aux_ptr, column, ld, side, factor):
    """(inv · factor, ratio, p) of the columns, from launch 1."""
    inside = column < ld
    inv = factor * tl.load(aux_ptr + side * ld + column, mask=inside, other=0.0)
    ratio = tl.load(aux_ptr + (2 + side) * ld + column, mask=inside, other=0.0)
    return inv, ratio, tl.load(aux_ptr + 4 * ld + column, mask=inside, other=0.0)


@triton.jit
def _weights(p, f, n, kappa):
    """(c, g) of the columns."""
    c = (2.0 / n) * (p - 1.0 - kappa * p)
    return c, 2.0 * kappa / n * f + c * p


@triton.jit
def _sum_parts(parts_ptr, column, parts, ld, COLUMNS: tl.constexpr):
    """Σ over [parts, ld] fp32, in order; 16 parts a load, for one latency."""
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, 16):
        part = first + tl.arange(0, 16)[:, None]
        mask = (part < parts) & (column < ld)[None, :]
        at = part * ld + column[None, :]
        total += tl.sum(tl.load(parts_ptr + at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _write(u, own, other, inv, c, slope, kappa, side, ds_ptr, dt_ptr, row, column, n, d):
    """The gradient of a tile from U/N², in the dtype of the input. ds, dt: [N, D] contiguous."""
    gradient = inv[None, :] * (2.0 * kappa * u + c[None, :] * other - slope[None, :] * own)
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    mask = (row < n)[:, None] & (column < d)[None, :]
    if side == 1:
        tl.store(ds_ptr + at, gradient.to(ds_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(dt_ptr + at, gradient.to(dt_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _loss(p, off, part_ptr, counter_ptr, values, inside, d, kappa, factor, block, blocks):
    """Adds this block's columns to the loss; the last block to come adds the parts up, in order.

    p, off [COLUMNS]: P_jj and Σ_k≠j P_kj², both 0 outside. part_ptr: [3, blocks] fp32 scratch. values: pointers of
    invariance, decorrelation, mean diagonal and loss.
    """
    tl.store(part_ptr + block, tl.sum(tl.where(inside, (p - 1.0) * (p - 1.0), 0.0), 0))
    tl.store(part_ptr + blocks + block, tl.sum(off, 0))
    tl.store(part_ptr + 2 * blocks + block, tl.sum(p, 0))
    if arrive(counter_ptr) == blocks - 1:
        lane = tl.arange(0, 128)
        invariance = tl.zeros([128], tl.float32)
        decorrelation = tl.zeros([128], tl.float32)
        diagonal = tl.zeros([128], tl.float32)
        for first in range(0, blocks, 128):
            mask = first + lane < blocks
            part = part_ptr + first + lane
            invariance += tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
            decorrelation += tl.load(part + blocks, mask=mask, other=0.0, cache_modifier=".cg")
            diagonal += tl.load(part + 2 * blocks, mask=mask, other=0.0, cache_modifier=".cg")
        total_invariance = tl.sum(invariance, 0)
        total_decorrelation = tl.sum(decorrelation, 0)
        tl.store(values[0], total_invariance)
        tl.store(values[1], total_decorrelation)
        tl.store(values[2], tl.sum(diagonal, 0) / d)
        tl.store(values[3], factor * (total_invariance + kappa * total_decorrelation))


@triton.jit
def _gram_tile(
    c_ptr, own_ptr, row, column, n, ld, ldc,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """K[row, :] · own[:, column], fp32 [ROWS, COLUMNS]."""
    row = row.to(tl.int64)[:, None]
    wide = column.to(tl.int64)[None, :]
    inside = (column < ld)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(c_ptr + row * ldc + k[None, :], mask=(row < n) & (k < ldc)[None, :], other=0.0)
        b = tl.load(own_ptr + k.to(tl.int64)[:, None] * ld + wide, mask=(k < n)[:, None] & inside, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n"])
def gradient_resident(
    z_ptr,  # [2, N, ld] product dtype
    student_ptr,  # T Tᵀ / D [N, ldc], zero beyond column N
    teacher_ptr,  # S Sᵀ / D [N, ldc], likewise
    aux_ptr,  # [5, ld] fp32, then [3, blocks] scratch
    counter_ptr,  # int32, zero
    invariance_ptr,
    decorrelation_ptr,
    diagonal_ptr,
    loss_ptr,
    ds_ptr,  # [N, D] contiguous, dtype of the student
    dt_ptr,  # [N, D] contiguous, dtype of the teacher
    n,
    d,
    ld,
    plane,  # N · ld
    ldc,
    kappa,
    factor,  # of the loss and the gradients, not of the parts
    scale,  # D / N²: K S · scale = U / N²
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Gram form, all N ≤ ROWS rows of COLUMNS columns: U stays in registers. Grid: (blocks, sides)."""
    side = tl.program_id(1) if STUDENT and TEACHER else (0 if TEACHER else 1)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own_ptr = z_ptr + side * plane
    multiplier = student_ptr if side == 1 else teacher_ptr
    at = row.to(tl.int64)[:, None] * ld + column[None, :]
    mask = (row < n)[:, None] & (column < ld)[None, :]
    # Loaded before the product: their latency is hidden behind it.
    inv, ratio, p = _constants(aux_ptr, column, ld, side, factor)
    own = tl.load(own_ptr + at, mask=mask, other=0.0)
    other = tl.load(z_ptr + (1 - side) * plane + at, mask=mask, other=0.0)
    u = scale * _gram_tile(multiplier, own_ptr, row, column, n, ld, ldc, PRECISION, ROWS, COLUMNS, DEPTH)
    own = own.to(tl.float32)
    f = tl.sum(u * own, 0)
    if STUDENT or TEACHER:
        c, g = _weights(p, f, n, kappa)
        _write(u, own, other.to(tl.float32), inv, c, ratio * g, kappa, side, ds_ptr, dt_ptr, row, column, n, d)
    if side == 1 or not STUDENT:
        values = (invariance_ptr, decorrelation_ptr, diagonal_ptr, loss_ptr)
        part_ptr = aux_ptr + 5 * ld
        _loss(
            p, f - p * p, part_ptr, counter_ptr, values, column < d, d, kappa, factor, tl.program_id(0), tl.num_programs(0)
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def gradient_parked(
    z_ptr,
    student_ptr,
    teacher_ptr,
    sums_ptr,  # [sides, groups, ld] fp32 scratch: parts of f
    parked_ptr,  # [sides, N, ld] fp32 scratch: U / N²; unused where no gradient is wanted
    aux_ptr,
    counter_ptr,  # [1 + sides · blocks] int32, zero: the loss, then the column blocks
    invariance_ptr,
    decorrelation_ptr,
    diagonal_ptr,
    loss_ptr,
    ds_ptr,
    dt_ptr,
    n,
    d,
    ld,
    plane,
    ldc,
    kappa,
    factor,
    scale,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Gram form, any N: U is parked while f is summed over all rows. Grid: (blocks, groups, sides).

    A group takes every groups-th tile of ROWS rows; the last group of a column block adds the parts of f and reads U
    back for the gradient. With one group that is the same program in two passes.
    """
    block = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    side = tl.program_id(2) if STUDENT and TEACHER else (0 if TEACHER else 1)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < ld
    own_ptr = z_ptr + side * plane
    other_ptr = z_ptr + (1 - side) * plane
    multiplier = student_ptr if side == 1 else teacher_ptr
    parked = parked_ptr + tl.program_id(2) * plane
    sums = sums_ptr + tl.program_id(2) * groups * ld
    f = tl.zeros([COLUMNS], tl.float32)
    for first in range(group * ROWS, n, groups * ROWS):
        row = first + tl.arange(0, ROWS)
        u = scale * _gram_tile(multiplier, own_ptr, row, column, n, ld, ldc, PRECISION, ROWS, COLUMNS, DEPTH)
        at = row.to(tl.int64)[:, None] * ld + column[None, :]
        mask = (row < n)[:, None] & inside[None, :]
        f += tl.sum(u * tl.load(own_ptr + at, mask=mask, other=0.0).to(tl.float32), 0)
        if STUDENT or TEACHER:
            tl.store(parked + at, u, mask=mask)
    tl.store(sums + group * ld + column, f, mask=inside)
    if arrive(counter_ptr + 1 + tl.program_id(2) * tl.num_programs(0) + block) == groups - 1:
        f = _sum_parts(sums, column, groups, ld, COLUMNS)
        inv, ratio, p = _constants(aux_ptr, column, ld, side, factor)
        if STUDENT or TEACHER:
            c, g = _weights(p, f, n, kappa)
            for first in range(0, n, ROWS):
                row = first + tl.arange(0, ROWS)
                at = row.to(tl.int64)[:, None] * ld + column[None, :]
                mask = (row < n)[:, None] & inside[None, :]
                u = tl.load(parked + at, mask=mask, other=0.0, cache_modifier=".cg")
                own = tl.load(own_ptr + at, mask=mask, other=0.0).to(tl.float32)
                other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
                _write(u, own, other, inv, c, ratio * g, kappa, side, ds_ptr, dt_ptr, row, column, n, d)
        if side == 1 or not STUDENT:
            values = (invariance_ptr, decorrelation_ptr, diagonal_ptr, loss_ptr)
            part_ptr = aux_ptr + 5 * ld
            _loss(p, f - p * p, part_ptr, counter_ptr, values, column < d, d, kappa, factor, block, tl.num_programs(0))


@triton.jit(do_not_specialize=["n", "parts"])
def gradient_covariance(
    z_ptr,
    student_ptr,  # Pᵀ [ld, ld]: of T P, column j of P is read along k, as tensor cores want tf32
    teacher_ptr,  # P [ld, ld], for S Pᵀ
    sums_ptr,  # [2, parts, ld] fp32: Σ_k≠j P_kj² in parts, for the student's columns and for the teacher's
    aux_ptr,
    counter_ptr,
    invariance_ptr,
    decorrelation_ptr,
    diagonal_ptr,
    loss_ptr,
    ds_ptr,
    dt_ptr,
    n,
    d,
    ld,
    plane,
    parts,
    kappa,
    factor,
    scale,  # 1 / N: T P · scale = U / N²
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Covariance form: f is known already, so every tile of the gradient stands alone. Grid: (row tiles, blocks, sides)."""
    block = tl.program_id(1)
    side = tl.program_id(2) if STUDENT and TEACHER else (0 if TEACHER else 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < ld
    inv, ratio, p = _constants(aux_ptr, column, ld, side, factor)
    off = _sum_parts(sums_ptr + (1 - side) * parts * ld, column, parts, ld, COLUMNS)
    if STUDENT or TEACHER:
        own_ptr = z_ptr + side * plane
        other_ptr = z_ptr + (1 - side) * plane
        wide = column.to(tl.int64)[None, :]
        line = row.to(tl.int64)[:, None] * ld
        multiplier = student_ptr if side == 1 else teacher_ptr
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, ld, DEPTH):
            k = first + tl.arange(0, DEPTH)
            a = tl.load(other_ptr + line + k[None, :], mask=(row < n)[:, None] & (k < ld)[None, :], other=0.0)
            b_mask = (k < ld)[:, None] & inside[None, :]
            b = tl.load(multiplier + wide * ld + k[:, None], mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        c, g = _weights(p, off + p * p, n, kappa)
        mask = (row < n)[:, None] & inside[None, :]
        own = tl.load(own_ptr + line + wide, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + line + wide, mask=mask, other=0.0).to(tl.float32)
        _write(acc * scale, own, other, inv, c, ratio * g, kappa, side, ds_ptr, dt_ptr, row, column, n, d)
    if tl.program_id(0) == 0 and (side == 1 or not STUDENT):
        values = (invariance_ptr, decorrelation_ptr, diagonal_ptr, loss_ptr)
        _loss(p, off, aux_ptr + 5 * ld, counter_ptr, values, column < d, d, kappa, factor, block, tl.num_programs(1))
