"""Routed layers on CUDA, the host side of the backward (``routed_backward.py``, ``routed_norm.py``).

Arguments as in ``routed_linear.py``. Every gradient has a buffer of its own that is written by the call and None if it is
not needed. Two kinds must be **zero before**: dx (rows that no unit lists keep it) and dgate (units that are not listed).
Gradients of weights and biases are written everywhere, zeros where nobody is active; compact gradients (dh, dy) for
listed rows only.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configs, routed_configs
from .routed_backward import (
    activation_backward_kernel,
    add_parts_kernel,
    column_sums_kernel,
    input_gradient_kernel,
    weight_gradient_kernel,
)
from .routed_linear import PRECISIONS, device_facts, options, pass_tile, product_options, product_tile
from .routed_norm import gate_rows_kernel, gate_units_kernel, norm_backward_kernel, residual_backward_kernel

__all__ = [
    "activation_backward",
    "linear_residual_backward",
    "norm_backward",
    "norm_linear_backward",
    "residual_backward",
]


def _scratch(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _add_parts(parts: Tensor, out: Tensor, stride: int, splits: int) -> None:
    tile = routed_configs.row_tile("add_parts", out.numel())
    chosen = options(tile)
    del chosen["ROWS"]
    add_parts_kernel[(triton.cdiv(out.numel(), tile.columns),)](parts, out, out.numel(), stride, splits, **chosen)


def _column_sums(
    a: Tensor, gather: bool, gate: Tensor | None, index: Tensor, count: Tensor, rows_per_unit: int, capacity: int,
    along: Tensor | None, level: Tensor | None, x: Tensor | None = None, statistics: Tensor | None = None,
    rms: bool = False,
) -> None:  # fmt: skip
    """``level`` = Σ a(m); ``along`` = Σ a(m) x̂(m), where x and statistics are given. None: not needed."""
    columns = a.shape[1]
    tile = routed_configs.row_tile("column_sums", columns)
    blocks = triton.cdiv(columns, tile.columns)
    # Enough programs for the GPU, of at least four steps; at most 64 parts to add.
    splits = max(1, min(64, triton.cdiv(4 * device_facts(a.device)[1], blocks), triton.cdiv(capacity, 4 * tile.rows)))
    sums = 1 if x is None else 2
    parts = _scratch(a, splits, sums, columns)
    column_sums_kernel[(blocks, splits)](
        a, a if x is None else x, a if gate is None else gate, a if x is None else statistics, index, count, parts,
        rows_per_unit, columns, a.stride(0), 0 if x is None else x.stride(0),
        **options(tile, GATHER=gather, GATE=gate is not None, NORM=x is not None, RMS=rms),
    )  # fmt: skip
    if along is not None:
        _add_parts(parts, along, sums * columns, splits)
    if level is not None:
        _add_parts(parts[:, sums - 1], level, sums * columns, splits)


def _weight_gradient(
    a: Tensor, b: Tensor, out: Tensor, gather_a: bool, gather_b: bool, gate: Tensor | None, index: Tensor,
    count: Tensor, rows_per_unit: int, capacity: int, precision: str, statistics: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, rms: bool = False,
) -> None:  # fmt: skip
    rows, columns = out.shape
    arch, processors = device_facts(a.device)
    product = PRECISIONS[precision][1]
    if any(size % 16 for size in (rows, columns, a.stride(0), b.stride(0))):
        tile = routed_configs.ragged_tile("weight_gradient", product)
    else:
        tile = routed_configs.lookup("weight_gradient", arch, product, rows, columns, capacity, processors)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    splits = configs.splits(arch, tiles, triton.cdiv(capacity, tile.depth))
    parts = _scratch(a, splits, rows, columns) if splits > 1 else out
    weight_gradient_kernel[(tiles, splits)](
        a, b, a if gate is None else gate, a if statistics is None else statistics,
        a if norm_weight is None else norm_weight, a if norm_bias is None else norm_bias, index, count, parts,
        rows_per_unit, rows, columns, a.stride(0), b.stride(0),
        **product_options(
            tile, precision, None, GATHER_A=gather_a, GATHER_B=gather_b, GATE=gate is not None,
            NORM=statistics is not None, RMS=rms, SCALE=norm_weight is not None, SHIFT=norm_bias is not None,
        ),
    )  # fmt: skip
    if splits > 1:
        _add_parts(parts, out, rows * columns, splits)


def _input_gradient(
    a: Tensor, weight: Tensor, h: Tensor | None, gate: Tensor | None, gather: bool, index: Tensor, count: Tensor,
    rows_per_unit: int, capacity: int, out: Tensor | None, precision: str,
) -> Tensor | None:  # fmt: skip
    """Writes ``out``; returns the parts of <h, a W> [capacity, parts] if h is given."""
    depth, columns = weight.shape
    tile, programs = product_tile("input_gradient", a, precision, capacity, columns, depth, a.stride(0))
    across = triton.cdiv(columns, tile.columns)
    parts = None if h is None else _scratch(a, capacity, across)
    input_gradient_kernel[(programs,)](
        a, weight, a if h is None else h, a if gate is None else gate, index, count, a if out is None else out,
        a if parts is None else parts, rows_per_unit, depth, columns, across, a.stride(0),
        0 if h is None else h.stride(0), 0 if out is None else out.stride(0),
        **product_options(
            tile, precision, depth, GATHER=gather, GATE=gate is not None, DOT=h is not None, STORE=out is not None
        ),
    )  # fmt: skip
    return parts


def _gate_gradient(dot: Tensor, index: Tensor, count: Tensor, rows_per_unit: int, dgate: Tensor) -> None:
    tile = routed_configs.row_tile("gate_units", rows_per_unit)
    grid = (triton.cdiv(dgate.shape[0], tile.rows),)
    gate_units_kernel[grid](dot, index, count, dgate, rows_per_unit, **options(tile))


def activation_backward(
    dout: Tensor,  # [capacity, F]
    pre: Tensor,  # [capacity, F or 2F]
    count: Tensor,
    rows_per_unit: int,
    dpre: Tensor,  # [capacity, F or 2F]
    *,
    act: str,
) -> None:
    """dpre[m] = act'(pre[m]) dout[m], one launch; ``dpre`` may be ``dout`` itself, but for "swiglu"."""
    capacity, columns = dout.shape
    tile, programs = pass_tile("activation_backward", dout, capacity, columns)
    with torch.cuda.device_of(dout):
        activation_backward_kernel[(programs, triton.cdiv(columns, tile.columns))](
            dout, pre, count, dpre, rows_per_unit, columns, dout.stride(0), pre.stride(0), dpre.stride(0),
            **options(tile, ACT=act),
        )  # fmt: skip


def norm_backward(
    dy: Tensor,  # [capacity, D]
    x: Tensor,  # [R, D]
    row_statistics: Tensor | None,  # [capacity, 2]
    norm_weight: Tensor | None,  # [D]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    *,
    norm: str,
    dx: Tensor | None = None,  # [R, D]
    dnorm_weight: Tensor | None = None,  # [D]
    dnorm_bias: Tensor | None = None,  # [D]
) -> None:
    """Backward of :func:`routed_linear.norm`: dx in one launch, dγ and dβ together in two or three.

    Args:
        dy: gradient of the compact normalised rows.
        x: as in the forward.
        row_statistics: as the forward wrote them; None for "none".
        norm_weight: γ, or None for 1.
        index: see ``routed_linear.py``.
        count: likewise.
        rows_per_unit: likewise.
        norm: "layer", "rms", "none".
        dx: [R, D], zero before; listed rows are written.
        dnorm_weight: [D], any dtype.
        dnorm_bias: [D], any dtype.
    """
    capacity = dy.shape[0]
    with torch.cuda.device_of(x):
        if dx is not None:
            tile, programs = pass_tile("norm_backward", x, capacity, x.shape[1])
            norm_backward_kernel[(programs,)](
                dy, x, x if row_statistics is None else row_statistics, x if norm_weight is None else norm_weight,
                index, count, dx, rows_per_unit, x.shape[1], dy.stride(0), x.stride(0), dx.stride(0),
                **options(tile, NORM=norm != "none", RMS=norm == "rms", SCALE=norm_weight is not None),
            )  # fmt: skip
        if dnorm_weight is not None or dnorm_bias is not None:
            of_x = (None, None) if dnorm_weight is None else (x, row_statistics)
            _column_sums(
                dy, False, None, index, count, rows_per_unit, capacity, dnorm_weight, dnorm_bias, *of_x, norm == "rms"
            )  # fmt: skip


def norm_linear_backward(
    dout: Tensor,  # [capacity, F]
    x: Tensor,  # [R, D]
    weight: Tensor,  # [F or 2F, D]
    norm_weight: Tensor | None,  # [D]
    norm_bias: Tensor | None,  # [D]
    pre: Tensor | None,  # [capacity, F or 2F]
    row_statistics: Tensor | None,  # [capacity, 2]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    *,
    norm: str,
    act: str = "none",
    dx: Tensor | None = None,  # [R, D]
    dweight: Tensor | None = None,  # [F or 2F, D]
    dbias: Tensor | None = None,  # [F or 2F]
    dnorm_weight: Tensor | None = None,  # [D]
    dnorm_bias: Tensor | None = None,  # [D]
    precision: str = "float32",
) -> None:
    """Backward of :func:`routed_linear.norm_linear`.

    Args:
        dout: gradient of the compact output.
        x: as in the forward.
        weight: as in the forward, not folded.
        norm_weight: likewise.
        norm_bias: likewise.
        pre: as the forward wrote it; None for act "none".
        row_statistics: as the forward wrote them; None for norm "none".
        index: see ``routed_linear.py``.
        count: likewise.
        rows_per_unit: likewise.
        norm: as in the forward.
        act: as in the forward.
        dx: [R, D], zero before; listed rows are written.
        dweight: contiguous, any dtype.
        dbias: [F or 2F], any dtype.
        dnorm_weight: [D], any dtype.
        dnorm_bias: [D], any dtype.
        precision: of the factors of the products.
    """
    capacity = dout.shape[0]
    where = (index, count, rows_per_unit)
    dpre = dout
    with torch.cuda.device_of(x):
        if act != "none":
            dpre = torch.empty((capacity, weight.shape[0]), dtype=dout.dtype, device=dout.device)
            activation_backward(dout, pre, count, rows_per_unit, dpre, act=act)
        if dweight is not None:
            used = None if norm == "none" else row_statistics
            _weight_gradient(
                dpre, x, dweight, False, True, None, *where, capacity, precision, used, norm_weight, norm_bias,
                norm == "rms",
            )  # fmt: skip
        if dbias is not None:
            _column_sums(dpre, False, None, *where, capacity, None, dbias)
        if dx is None and dnorm_weight is None and dnorm_bias is None:
            return
        dy = torch.empty((capacity, x.shape[1]), dtype=x.dtype, device=x.device)
        _input_gradient(dpre, weight, None, None, False, *where, capacity, dy, precision)
    norm_backward(
        dy, x, row_statistics, norm_weight, *where, norm=norm, dx=dx, dnorm_weight=dnorm_weight, dnorm_bias=dnorm_bias
    )  # fmt: skip


def linear_residual_backward(
    dout: Tensor,  # [R, F]
    h: Tensor,  # [capacity, K]
    weight: Tensor,  # [F, K]
    bias: Tensor | None,  # [F]
    gate: Tensor | None,  # [U]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    *,
    dh: Tensor | None = None,  # [capacity, K]
    dweight: Tensor | None = None,  # [F, K]
    dbias: Tensor | None = None,  # [F]
    dgate: Tensor | None = None,  # [U]
    precision: str = "float32",
) -> None:
    """Backward of :func:`routed_linear.linear_residual`, but for x's gradient, which is dout itself.

    Args:
        dout: gradient of the new x.
        h: as in the forward.
        weight: likewise.
        bias: likewise.
        gate: likewise.
        index: see ``routed_linear.py``.
        count: likewise.
        rows_per_unit: likewise.
        dh: [capacity, K]; listed rows are written.
        dweight: [F, K] contiguous, any dtype.
        dbias: [F], any dtype.
        dgate: float32 [U], zero before; listed units are written.
        precision: of the factors of the products.
    """
    capacity = h.shape[0]
    where = (index, count, rows_per_unit)
    with torch.cuda.device_of(dout):
        if dh is not None or dgate is not None:
            dotted = None if dgate is None else h
            parts = _input_gradient(dout, weight, dotted, gate, True, *where, capacity, dh, precision)
        if dgate is not None:
            dot = _scratch(dout, capacity)
            tile, programs = pass_tile("gate_rows", dout, capacity, dout.shape[1])
            gate_rows_kernel[(programs,)](
                dout, dout if bias is None else bias, parts, index, count, dot, rows_per_unit, dout.shape[1],
                parts.shape[1], dout.stride(0), **options(tile, BIAS=bias is not None),
            )  # fmt: skip
            _gate_gradient(dot, *where, dgate)
        if dweight is not None:
            _weight_gradient(dout, h, dweight, True, False, gate, *where, capacity, precision)
        if dbias is not None:
            _column_sums(dout, True, gate, *where, capacity, None, dbias)


def residual_backward(
    dout: Tensor,  # [R, D]
    y: Tensor | None,  # [capacity, D]
    gate: Tensor | None,  # [U]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    capacity: int,
    *,
    dy: Tensor | None = None,  # [capacity, D]
    dgate: Tensor | None = None,  # [U]
) -> None:
    """Backward of :func:`routed_linear.residual`: dy[m] = g dout[row(m)], dgate = Σ <y[m], dout[row(m)]>.

    ``y`` is read for dgate only, which is float32 and zero before; of ``dy`` the listed rows are written.
    """
    dot = None if dgate is None else _scratch(dout, capacity)
    tile, programs = pass_tile("residual_backward", dout, capacity, dout.shape[1])
    with torch.cuda.device_of(dout):
        residual_backward_kernel[(programs,)](
            dout, dout if y is None else y, dout if gate is None else gate, index, count, dout if dy is None else dy,
            dout if dot is None else dot, rows_per_unit, dout.shape[1], dout.stride(0), 0 if y is None else y.stride(0),
            0 if dy is None else dy.stride(0),
            **options(tile, GATE=gate is not None, STORE=dy is not None, DOT=dgate is not None),
        )  # fmt: skip
        if dgate is not None:
            _gate_gradient(dot, index, count, rows_per_unit, dgate)
