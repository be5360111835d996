"""Routed linear maps by the Triton kernels: the count of active units stays on the device.

Two ways through a layer. :class:`TritonRouted` is the backend behind the ops, with gradients. For inference
:func:`carried_ln_linear` and :func:`carried_residual_` keep every row's sum and sum of squares beside the residual stream, so that
a norm costs nothing but a correction after the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdfast.ops._extension import triton_state

if TYPE_CHECKING:
    from xdfast.ops.route import RouteList

__all__ = [
    "TritonRouted",
    "carried_ln_linear",
    "carried_residual_",
    "carried_statistics",
    "fold_norm",
    "precision_of",
    "triton_available",
]

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def triton_available(device: str) -> tuple[bool, str]:
    """Whether the Triton kernels can run on ``device``, and why (not)."""
    if device != "cuda":
        return False, "the Triton kernels are for CUDA tensors"
    return triton_state("counts stay on the device, no synchronisation")


def precision_of(weight: Tensor) -> str:
    """Name of the precision of the products, as torch would take it for such a weight."""
    if weight.dtype in _NAMES:
        return _NAMES[weight.dtype]
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class TritonRouted:
    """The interface of :class:`xdfast.ops.routed.composed.ComposedRouted` by ``xdfast.kernels.routed_*``."""

    @staticmethod
    def ln_linear(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
        index: Tensor, count: Tensor, units: int, rows_per_unit: int, norm: str, eps: float, act: str, save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from xdfast.kernels import routed_linear as kernels

        x = _rows(x)
        capacity = (units if units >= 0 else index.numel()) * rows_per_unit
        keep = save and norm != "none"
        statistics = x.new_empty((capacity if keep else 0, 2), dtype=torch.float32)
        where = (_flat(norm_weight), _flat(norm_bias), index, count, rows_per_unit)
        options: dict[str, Any] = {"norm": norm, "eps": eps, "row_statistics": statistics if keep else None}
        pre = x.new_empty(0, 0)
        if weight is None:
            out = x.new_empty(capacity, x.shape[1])
            if capacity:
                kernels.norm(x, *where, out, **options)
            return out, pre, statistics
        out = weight.new_empty(capacity, weight.shape[0] // (2 if act == "swiglu" else 1))
        if save and act != "none":
            pre = weight.new_empty(capacity, weight.shape[0])
            options["pre"] = pre
        if capacity:
            kernels.norm_linear(
                x, weight.contiguous(), _flat(bias), *where, out, act=act, precision=precision_of(weight), **options
            )
        return out, pre, statistics

    @staticmethod
    def ln_linear_backward(
        dout: Tensor, x: Tensor, pre: Tensor, statistics: Tensor, weight: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, index: Tensor, count: Tensor, units: int, rows_per_unit: int, norm: str, eps: float,
        act: str, wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        from xdfast.kernels import routed_gradients as kernels

        x, width = _rows(x), x.shape[1]
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if any((wanted[0], *wanted[3:])) else None
        dweight = torch.empty_like(weight) if weight is not None and wanted[1] else None
        dbias = dout.new_empty(weight.shape[0]) if weight is not None and wanted[2] else None
        sums = [x.new_empty(width, dtype=torch.float32) if want else None for want in wanted[3:]]
        made = {"dx": dx, "dnorm_weight": sums[0], "dnorm_bias": sums[1]}
        rows = None if norm == "none" else statistics
        if dout.shape[0] == 0:
            for t in (dweight, dbias, *sums):
                if t is not None:
                    t.zero_()
        elif weight is None:
            kernels.norm_backward(
                dout, x, rows, _flat(norm_weight), index, count, rows_per_unit, norm=norm, **made
            )  # fmt: skip
        else:
            kernels.norm_linear_backward(
                dout, x, weight.contiguous(), _flat(norm_weight), _flat(norm_bias), None if act == "none" else pre,
                rows, index, count, rows_per_unit, norm=norm, act=act, dweight=dweight, dbias=dbias,
                precision=precision_of(weight), **made,
            )  # fmt: skip
        dx, dweight, dbias, dnorm_weight, dnorm_bias = (
            dout.new_empty(0) if t is None else t for t in (dx, dweight, dbias, *sums)
        )
        return dx, dweight, dbias, dnorm_weight, dnorm_bias

    @staticmethod
    def linear_residual_(
        x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, index: Tensor,
        count: Tensor, units: int, rows_per_unit: int,
    ) -> None:  # fmt: skip
        from xdfast.kernels import routed_linear as kernels

        where = (_flat(gate), index, count, rows_per_unit)
        if h.shape[0] == 0:
            return
        if weight is None:
            kernels.residual(x, _rows(h), *where)
        else:
            kernels.linear_residual(
                x, _rows(h), weight.contiguous(), _flat(bias), *where, precision=precision_of(weight)
            )  # fmt: skip

    @staticmethod
    def linear_residual_backward(
        dout: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, index: Tensor,
        count: Tensor, units: int, rows_per_unit: int, wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        from xdfast.kernels import routed_gradients as kernels

        h = _rows(h)
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted[0] else None
        dweight = torch.zeros_like(weight) if weight is not None and wanted[1] else None
        dbias = h.new_zeros(dout.shape[1]) if wanted[2] else None
        dgate = None if gate is None or not wanted[3] else torch.zeros_like(gate, dtype=torch.float32)
        where = (_flat(gate), index, count, rows_per_unit)
        if h.shape[0]:
            if weight is None:
                kernels.residual_backward(dout, h, *where, h.shape[0], dy=dh, dgate=dgate)
            else:
                kernels.linear_residual_backward(
                    dout, h, weight.contiguous(), _flat(bias), *where, dh=dh, dweight=dweight, dbias=dbias, dgate=dgate,
                    precision=precision_of(weight),
                )  # fmt: skip
        dh, dweight, dbias, dgate = (dout.new_empty(0) if t is None else t for t in (dh, dweight, dbias, dgate))
        return dh, dweight, dbias, dgate


def carried_statistics(x: Tensor) -> Tensor:
    """Sums and sums of squares of the rows of a fresh x [R, D], in parts: [R, parts, 2] float32."""
    from xdfast.kernels import routed_linear as kernels

    statistics = x.new_empty((x.shape[0], kernels.statistics_parts(x.shape[1]), 2), dtype=torch.float32)
    kernels.moments(x, statistics)
    return statistics


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(W γ [F, D], its row sums [F], W β + b [F]): a linear map behind a norm whose statistics are carried."""
    from xdfast.kernels import routed_linear as kernels

    return kernels.fold_norm(weight, bias, norm_weight, norm_bias, weight.dtype)


def carried_ln_linear(
    x: Tensor,
    statistics: Tensor,
    folded: tuple[Tensor, Tensor, Tensor],
    route: RouteList,
    norm: str,
    eps: float,
    act: str,
) -> Tensor:
    """act(norm(x[rows]) Wᵀ + b) [``route.capacity``, F]; ``folded`` by :func:`fold_norm`, statistics as carried with x."""
    from xdfast.kernels import routed_linear as kernels

    weight, sums, shift = folded
    out = weight.new_empty(route.capacity, weight.shape[0] // (2 if act == "swiglu" else 1))
    kernels.norm_linear(
        x, weight, shift, None, None, route.index, route.count, route.rows_per_unit, out, norm=norm, eps=eps, act=act,
        statistics=None if norm == "none" else statistics, weight_sums=sums, precision=precision_of(weight),
    )  # fmt: skip
    return out


def carried_residual_(
    x: Tensor, statistics: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, route: RouteList
) -> None:
    """x[row] += g · (h Wᵀ + b) in place, and the statistics of the changed rows."""
    from xdfast.kernels import routed_linear as kernels

    kernels.linear_residual(
        x, _rows(h), weight.contiguous(), _flat(bias), _flat(route.gate), route.index, route.count,
        route.rows_per_unit, statistics=statistics, precision=precision_of(weight),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
