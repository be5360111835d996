"""Column standardisation on CUDA: mean, biased std and the standardised matrix in one launch.

    z[n, d] = (x[n, d] − mean_d) / (std_d + ε)
    inv_d   = 1 / (std_d + ε),   ratio_d = (std_d + ε) / std_d, 0 where std_d = 0

A program owns whole columns, so there are no atomics and no second launch, and the result does not depend on the order
in which programs run. The mean is kept as hi + lo (mean of x, then the mean of x − hi): with column means of 1e5
standard deviations one fp32 mean loses three digits of the gradient.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from . import configs

__all__ = ["column_standardize"]


@triton.jit
def _finish(total_lo, squares, n, eps):
    """(lo, inv, ratio) from the sums of (x − hi) and (x − hi)²; IEEE division and root, the fast ones cost 2 ulp."""
    count = tl.zeros_like(squares) + n
    lo = tl.math.div_rn(total_lo, count)
    variance = tl.math.div_rn(squares, count) - lo * lo
    variance = tl.where(variance < 0.0, 0.0, variance)  # rounding; NaN compares false and stays
    std = tl.math.sqrt_rn(variance)
    inv = tl.math.div_rn(tl.zeros_like(std) + 1.0, std + eps)
    # The divisor is replaced where std = 0: the other branch of where() is computed too.
    ratio = tl.where(std == 0.0, 0.0, tl.math.div_rn(std + eps, tl.where(std == 0.0, 1.0, std)))
    return lo, inv, ratio


@triton.jit
def column_standardize_resident(
    x_ptr,  # [N, D] any strides
    z_ptr,  # [N, D] fp32 contiguous
    inv_ptr,  # [D] fp32
    ratio_ptr,  # [D] fp32
    n,
    d,
    x_row,
    x_col,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """All N ≤ ROWS rows of COLUMNS columns in registers: x is read once."""
    # 64-bit offsets: N·D of a legal tensor can pass 2^31 elements.
    row = tl.arange(0, ROWS).to(tl.int64)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = column < d
    mask = (row < n)[:, None] & inside[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + column[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
    hi = tl.sum(x, 0) / n
    x = tl.where(mask, x - hi[None, :], 0.0)
    lo, inv, ratio = _finish(tl.sum(x, 0), tl.sum(x * x, 0), n, eps)
    tl.store(z_ptr + row[:, None] * d + column[None, :], (x - lo[None, :]) * inv[None, :], mask=mask)
    tl.store(inv_ptr + column, inv, mask=inside)
    tl.store(ratio_ptr + column, ratio, mask=inside)


@triton.jit
def column_standardize_stream(
    x_ptr,  # [N, D] any strides
    z_ptr,  # [N, D] fp32 contiguous
    inv_ptr,  # [D] fp32
    ratio_ptr,  # [D] fp32
    n,
    d,
    x_row,
    x_col,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns of any length, ROWS rows at a time; every lane keeps its own partial sum until the end."""
    row = tl.arange(0, ROWS).to(tl.int64)
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    inside = column < d
    x_columns = x_ptr + column[None, :] * x_col

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        total += tl.load(x_columns + rows * x_row, mask=mask, other=0.0).to(tl.float32)
    hi = tl.sum(total, 0) / n

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        x = tl.load(x_columns + rows * x_row, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - hi[None, :], 0.0)
        total += x
        squares += x * x
    lo, inv, ratio = _finish(tl.sum(total, 0), tl.sum(squares, 0), n, eps)

    for first in range(0, n, ROWS):
        rows = (first + row)[:, None]
        mask = (rows < n) & inside[None, :]
        x = tl.load(x_columns + rows * x_row, mask=mask, other=0.0).to(tl.float32)
        z = ((x - hi[None, :]) - lo[None, :]) * inv[None, :]
        tl.store(z_ptr + rows * d + column[None, :], z, mask=mask)
    tl.store(inv_ptr + column, inv, mask=inside)
    tl.store(ratio_ptr + column, ratio, mask=inside)


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def column_standardize(
    x: torch.Tensor,  # [N, D]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardises the columns of ``x``.

    Args:
        x: [N, D] float32, bfloat16 or float16, any strides, N ≥ 1, on a CUDA device (under Triton's interpreter on
            the CPU).
        eps: added to the biased std.

    Returns:
        z [N, D] contiguous, inv [D] and ratio [D], all float32.
    """
    n, d = x.shape
    z = torch.empty((n, d), dtype=torch.float32, device=x.device)
    inv = torch.empty(d, dtype=torch.float32, device=x.device)
    ratio = torch.empty(d, dtype=torch.float32, device=x.device)
    if d == 0:
        return z, inv, ratio
    dtype = configs.dtype_key(x.dtype)
    arch = _architecture(x.device) if x.is_cuda else configs.ARCHITECTURES[-1]
    kernel = column_standardize_resident
    tile = configs.lookup("column_standardize_resident", arch, dtype, n)
    if tile is None:
        kernel = column_standardize_stream
        tile = configs.tiles("column_standardize_stream", arch, dtype)[-1]
    grid = (triton.cdiv(d, tile.columns),)
    with torch.cuda.device_of(x):  # Triton launches on the current device; a no-op for a CPU tensor
        kernel[grid](
            x, z, inv, ratio, n, d, x.stride(0), x.stride(1), eps,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return z, inv, ratio
