"""The passes over listed rows that surround the matrix products: by the C++ extension, or by plain PyTorch.

Compact matrices hold exactly ``units · rows_per_unit`` rows. The norm is "layer", "rms" or "none".
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xdfast.ops.routed.reference import norm_reference, rows_of

__all__ = ["CppRows", "RowPasses", "TorchRows"]

_NORMS = {"layer": 0, "rms": 1, "none": 2}


class RowPasses(Protocol):
    """What a backend brings to the products."""

    def gather_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor, units: int, rows_per_unit: int,
        norm: str, eps: float, save: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(norm(x[rows]) [n, D], statistics [n, 2] = (mean, 1 / std) fp32 if ``save`` else [0, 2])."""

    def scatter_add_(
        self, x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int
    ) -> None:
        """x[row] += gate[unit] · y[m], in place."""

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, index: Tensor, units: int,
        rows_per_unit: int, norm: str, wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx like x, zero where not listed; Σ dy·x̂ [D]; Σ dy [D]), the sums fp32 and [0] where not wanted."""

    def gather(self, x: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int) -> Tensor:
        """gate[unit] · x[rows] [n, D]."""

    def row_dots(self, a: Tensor, b: Tensor) -> Tensor:
        """⟨a[m], b[m]⟩ [n] fp32."""

    def swiglu(self, a: Tensor) -> Tensor:
        """silu(a[:, :F]) · a[:, F:] of a [n, 2F]."""


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _rows_contiguous(x: Tensor) -> Tensor:
    # contiguous() leaves a tensor without rows as it is, whatever its strides
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous() if x.numel() else x.new_empty(x.shape)


class CppRows:
    """``xdfast_c::*`` (csrc/cpu/routed.cpp): float32, bfloat16, float16 on the CPU."""

    @staticmethod
    def gather_norm(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor, units: int, rows_per_unit: int,
        norm: str, eps: float, save: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return torch.ops.xdfast_c.gather_norm.default(
            _rows_contiguous(x), _vector(weight), _vector(bias), index, units, rows_per_unit, _NORMS[norm], eps, save
        )

    @staticmethod
    def scatter_add_(x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int) -> None:
        y = _rows_contiguous(y if y.dtype == x.dtype else y.to(x.dtype))
        torch.ops.xdfast_c.scatter_add_.default(x, y, _vector(gate), index, units, rows_per_unit)

    @staticmethod
    def norm_backward(
        dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, index: Tensor, units: int,
        rows_per_unit: int, norm: str, wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        sums = torch.ops.xdfast_c.norm_backward_.default(
            dy.to(x.dtype).contiguous(), _rows_contiguous(x), _vector(weight), statistics, index, units,
            rows_per_unit, _NORMS[norm], *wanted, dx,
        )  # fmt: skip
        return dx, *sums

    @staticmethod
    def gather(x: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int) -> Tensor:
        return torch.ops.xdfast_c.gather.default(_rows_contiguous(x), _vector(gate), index, units, rows_per_unit)

    @staticmethod
    def row_dots(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.xdfast_c.row_dots.default(_rows_contiguous(a), _rows_contiguous(b.to(a.dtype)))

    @staticmethod
    def swiglu(a: Tensor) -> Tensor:
        return torch.ops.xdfast_c.swiglu.default(a.contiguous())


class TorchRows:
    """The same in plain PyTorch: any device and floating dtype."""

    @staticmethod
    def gather_norm(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, index: Tensor, units: int, rows_per_unit: int,
        norm: str, eps: float, save: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        taken = x.index_select(0, rows_of(index, units, rows_per_unit))
        statistics = _statistics(taken, norm, eps) if save else taken.new_empty(0, 2, dtype=torch.float32)
        return norm_reference(taken, weight, bias, norm, eps), statistics

    @staticmethod
    def scatter_add_(x: Tensor, y: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int) -> None:
        y = y[: units * rows_per_unit]
        if gate is not None:
            y = gate[index[:units].long()].to(_wide(y)).repeat_interleave(rows_per_unit)[:, None] * y
        x.index_add_(0, rows_of(index, units, rows_per_unit), y.to(x.dtype))

    @staticmethod
    def norm_backward(
        dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, index: Tensor, units: int,
        rows_per_unit: int, norm: str, wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows = rows_of(index, units, rows_per_unit)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        dtype = _wide(x)
        weight_sum, bias_sum = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
        if norm == "none":
            dx.index_copy_(0, rows, dy.to(x.dtype))
            return dx, weight_sum, bias_sum
        mean, inverse = statistics.to(dtype).unbind(-1)
        normal = (x.index_select(0, rows).to(dtype) - mean[:, None]) * inverse[:, None]
        g = dy.to(dtype)
        weight_sum = (g * normal).sum(0) if wanted[0] else weight_sum
        bias_sum = g.sum(0) if wanted[1] else bias_sum
        g = g if weight is None else g * weight.to(dtype)
        inner = g - normal * (g * normal).mean(-1, keepdim=True)
        if norm == "layer":
            inner = inner - g.mean(-1, keepdim=True)
        dx.index_copy_(0, rows, (inner * inverse[:, None]).to(x.dtype))
        return dx, weight_sum, bias_sum

    @staticmethod
    def gather(x: Tensor, gate: Tensor | None, index: Tensor, units: int, rows_per_unit: int) -> Tensor:
        taken = x.index_select(0, rows_of(index, units, rows_per_unit))
        if gate is None:
            return taken
        weights = gate[index[:units].long()].to(_wide(x)).repeat_interleave(rows_per_unit)
        return (taken * weights[:, None]).to(x.dtype)

    @staticmethod
    def row_dots(a: Tensor, b: Tensor) -> Tensor:
        dtype = _wide(a)
        return (a.to(dtype) * b.to(dtype)).sum(-1)

    @staticmethod
    def swiglu(a: Tensor) -> Tensor:
        gate, up = a.chunk(2, -1)
        return functional.silu(gate) * up


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "none":
        return x.new_empty(0, 2, dtype=_wide(x))
    wide = x.to(_wide(x))
    mean = wide.mean(-1) if norm == "layer" else torch.zeros_like(wide[:, 0])
    variance = (wide - mean[:, None]).square().mean(-1)
    return torch.stack((mean, (variance + eps).rsqrt()), -1)
