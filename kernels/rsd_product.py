"""RSD, launch 2: the multipliers of the gradients.

    Gram form, N < D            T Tᵀ / D and S Sᵀ / D [N, N]; 1/D keeps fp16 in range
    covariance form, N ≥ D      P = TᵀS / N and Pᵀ [D, D], |P| ≤ 1; and Σ P² off the diagonal, by column and by row

The contraction is split over programs (their partial tiles: ``tiles.py``); of a Gram matrix only the lower triangle is
computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import arrive

__all__ = ["product"]


@triton.jit
def _triangle(tile):
    """(row, column) of a tile of the lower triangle: 0 → (0, 0), 1 → (1, 0), 2 → (1, 1), …"""
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # the root may be rounded across an integer
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _store_gram(
    out_ptr, c, tile_row, tile_column, n, ldc,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Writes a finished tile of the lower triangle and its mirror image; columns N … ldc are zero in c."""
    i = tile_row * SIZE + tl.arange(0, SIZE)
    j = tile_column * SIZE + tl.arange(0, SIZE)
    c = c.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i.to(tl.int64)[:, None] * ldc + j[None, :], c, mask=(i < n)[:, None] & (j < ldc)[None, :])
    if tile_row != tile_column:  # a diagonal tile is not mirrored onto itself: two threads would write one element
        mask = (j < n)[:, None] & (i < ldc)[None, :]
        tl.store(out_ptr + j.to(tl.int64)[:, None] * ldc + i[None, :], tl.trans(c), mask=mask)


@triton.jit
def _store_covariance(
    student_ptr, teacher_ptr, sums_ptr, c, tile_row, tile_column, ld, across,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Writes a finished tile of P as Pᵀ and as P, and its sums of squares off the diagonal, from fp32."""
    i = tile_row * SIZE + tl.arange(0, SIZE)
    j = tile_column * SIZE + tl.arange(0, SIZE)
    mask = (i < ld)[:, None] & (j < ld)[None, :]
    off = tl.where(i[:, None] == j[None, :], 0.0, c)
    if STUDENT or not TEACHER:
        tl.store(sums_ptr + tile_row * ld + j, tl.sum(off * off, 0), mask=j < ld)
    if TEACHER:
        tl.store(sums_ptr + (across + tile_column) * ld + i, tl.sum(off * off, 1), mask=i < ld)
    c = c.to(student_ptr.dtype.element_ty)
    if STUDENT:
        tl.store(student_ptr + j.to(tl.int64)[:, None] * ld + i[None, :], tl.trans(c), mask=tl.trans(mask))
    if TEACHER:
        tl.store(teacher_ptr + i.to(tl.int64)[:, None] * ld + j[None, :], c, mask=mask)


@triton.jit
def _store(
    student_ptr, teacher_ptr, sums_ptr, c, tile_row, tile_column, n, ld, ldc, across,
    GRAM: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    if GRAM:
        for_student = tl.program_id(2) == 0 if STUDENT and TEACHER else STUDENT
        out_ptr = student_ptr if for_student else teacher_ptr
        _store_gram(out_ptr, c, tile_row, tile_column, n, ldc, SIZE)
    else:
        _store_covariance(
            student_ptr, teacher_ptr, sums_ptr, c, tile_row, tile_column, ld, across, STUDENT, TEACHER, SIZE
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def product(
    z_ptr,  # [2, N, ld] product dtype
    student_ptr,  # multiplier of the student's gradient: T Tᵀ / D [N, ldc] or Pᵀ [ld, ld], product dtype
    teacher_ptr,  # multiplier of the teacher's gradient: S Sᵀ / D [N, ldc] or P [ld, ld]
    parts_ptr,  # [sources · tiles, SPLITS, SIZE, SIZE] fp32
    sums_ptr,  # covariance: [2, tiles across, ld] fp32, Σ P² off the diagonal by column (k of a tile row), by row
    counter_ptr,  # [sources · tiles] int32, zero
    n,
    ld,
    plane,  # N · ld
    ldc,  # leading dimension of the multipliers, N or D rounded up to 16; columns N … ldc become zero
    chunk,  # contraction length of a split, a multiple of DEPTH
    scale,
    GRAM: tl.constexpr,
    STUDENT: tl.constexpr,  # which multipliers are written; none: the sums alone
    TEACHER: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One SIZE × SIZE tile of a multiplier over one part of the contraction. Grid: (tiles, SPLITS, sources)."""
    tile = tl.program_id(0)
    across = tl.cdiv(ld, SIZE)
    if GRAM:
        tile_row, tile_column = _triangle(tile)
        source = tl.program_id(2) if STUDENT else 1  # T Tᵀ for the student's gradient, S Sᵀ for the teacher's
        left = z_ptr + source * plane
        right = left
        size, depth = n, ld
    else:
        tile_row, tile_column = tile // across, tile % across
        left = z_ptr
        right = z_ptr + plane
        size, depth = ld, n
    i = (tile_row * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    j = (tile_column * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    inside_i = i < size
    inside_j = j < size
    start = tl.program_id(1) * chunk
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for first in range(start, tl.minimum(start + chunk, depth), DEPTH):
        k = (first + tl.arange(0, DEPTH)).to(tl.int64)
        inside_k = k < depth
        if GRAM:
            a_at = i[:, None] * ld + k[None, :]
            b_at = j[None, :] * ld + k[:, None]
        else:
            a_at = k[None, :] * ld + i[:, None]
            b_at = k[:, None] * ld + j[None, :]
        a = tl.load(left + a_at, mask=inside_i[:, None] & inside_k[None, :], other=0.0)
        b = tl.load(right + b_at, mask=inside_k[:, None] & inside_j[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SPLITS == 1:
        _store(
            student_ptr, teacher_ptr, sums_ptr, acc * scale, tile_row, tile_column, n, ld, ldc, across,
            GRAM, STUDENT, TEACHER, SIZE,
        )  # fmt: skip
    else:
        here = tl.program_id(2) * tl.num_programs(0) + tile
        lane = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        parts = parts_ptr + here.to(tl.int64) * (SPLITS * SIZE * SIZE) + lane
        tl.store(parts + tl.program_id(1) * (SIZE * SIZE), acc)
        if arrive(counter_ptr + here) == SPLITS - 1:
            acc = tl.load(parts, cache_modifier=".cg")
            if SIZE < 128:  # all loads in flight at once; a large tile has not the registers for it
                for part in tl.static_range(1, SPLITS):
                    acc += tl.load(parts + part * (SIZE * SIZE), cache_modifier=".cg")
            else:
                for part in range(1, SPLITS):
                    acc += tl.load(parts + part * (SIZE * SIZE), cache_modifier=".cg")
            _store(
                student_ptr, teacher_ptr, sums_ptr, acc * scale, tile_row, tile_column, n, ld, ldc, across,
                GRAM, STUDENT, TEACHER, SIZE,
            )  # fmt: skip
