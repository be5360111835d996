"""``xdfast::routed_*``: schemas, fake kernels, autograd and backends of the linear maps of routed layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdfast.ops._backends import Backend, register_table, select
from xdfast.ops._define import define_op
from xdfast.ops._extension import cpp_available
from xdfast.ops.routed.composed import ComposedRouted
from xdfast.ops.routed.rows import CppRows, TorchRows
from xdfast.ops.routed.triton import TritonRouted, triton_available

__all__ = ["implementation", "linear_residual_op", "linear_residual_op_", "ln_linear_op"]

_KNOWN, _UNKNOWN = "routed_linear", "routed_linear_list"
_TORCH = ComposedRouted(TorchRows())
_CPP = Backend("cpp", cpp_available, ComposedRouted(CppRows()))


def _torch(device: str) -> tuple[bool, str]:
    return True, "plain PyTorch: index_select, products, index_add; any device"


# The host knows how many units are active (the CPU, executor "planned"): library products of that size.
register_table(
    _KNOWN,
    [
        _CPP,
        Backend("torch", _torch, _TORCH),
        Backend("triton", triton_available, TritonRouted(), automatic=False),
        Backend("reference", _torch, _TORCH, automatic=False),
    ],
)
# It does not (executor "list"): the count stays on the device; plain PyTorch has to wait for it.
register_table(
    _UNKNOWN,
    [
        Backend("triton", triton_available, TritonRouted()),
        _CPP,
        Backend("torch", lambda device: (True, "plain PyTorch; waits for the device in every call"), _TORCH),
        Backend("reference", _torch, _TORCH, automatic=False),
    ],
)


def implementation(x: Tensor, units: int = 0) -> Any:
    """What runs for ``x`` and ``units`` active ones (negative: not known); float64 stays with plain PyTorch."""
    if x.dtype == torch.float64:
        return _TORCH
    return select(_KNOWN if units >= 0 else _UNKNOWN, x.device.type).run


def _routed_ln_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    units: int,
    rows_per_unit: int,
    norm: str,
    eps: float,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(x, units).ln_linear(
        x, weight, bias, norm_weight, norm_bias, index, count, units, rows_per_unit, norm, eps, act, save
    )


def _fake_ln_linear(
    x: Tensor, weight: Tensor | None, bias: Any, norm_weight: Any, norm_bias: Any, index: Any, count: Any,
    units: int, rows_per_unit: int, norm: str, eps: float, act: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    capacity = (units if units >= 0 else index.shape[0]) * rows_per_unit
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = x.new_empty((capacity if save and norm != "none" else 0, 2), dtype=wide)
    if weight is None:
        return x.new_empty((capacity, x.shape[1])), x.new_empty(0, 0), statistics
    features = weight.shape[0] // (2 if act == "swiglu" else 1)
    pre = weight.new_empty((capacity, weight.shape[0])) if save and act != "none" else x.new_empty(0, 0)
    return weight.new_empty((capacity, features)), pre, statistics


def _setup_ln_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, norm_weight, norm_bias, index, count, *options = inputs
    ctx.options = options[:-1]  # units, rows_per_unit, norm, eps, act
    _, pre, statistics = output
    ctx.mark_non_differentiable(pre, statistics)
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, index, count, pre, statistics)


def _backward_ln_linear(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    x, weight, norm_weight, norm_bias, index, count, pre, statistics = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    found = _ln_linear_backward_op(
        grad.contiguous(), x, pre, statistics, weight, norm_weight, norm_bias, index, count, *ctx.options, wanted
    )
    like = (x, weight, weight, norm_weight, norm_bias)
    grads = [g.to(t.dtype) if want else None for g, t, want in zip(found, like, wanted, strict=True)]
    return *grads, *(None,) * 8


def _routed_ln_linear_backward(
    dout: Tensor,
    x: Tensor,
    pre: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    units: int,
    rows_per_unit: int,
    norm: str,
    eps: float,
    act: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return implementation(x, units).ln_linear_backward(
        dout,
        x,
        pre,
        statistics,
        weight,
        norm_weight,
        norm_bias,
        index,
        count,
        units,
        rows_per_unit,
        norm,
        eps,
        act,
        wanted,
    )


def _fake_ln_linear_backward(
    dout: Tensor, x: Tensor, pre: Tensor, statistics: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wanted: list[bool] = rest[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inner = wanted[0] or wanted[3] or wanted[4]
    dweight = dbias = dout.new_empty(0)
    if weight is not None:
        dweight = dout.new_empty(weight.shape) if wanted[1] else dweight
        dbias = dout.new_empty(weight.shape[:1]) if wanted[2] else dbias
    sums = [x.new_empty((x.shape[1] if w else 0,), dtype=wide) for w in wanted[3:]]
    return torch.empty_like(x) if inner else dout.new_empty(0), dweight, dbias, *sums


def _routed_linear_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    index: Tensor,
    count: Tensor,
    units: int,
    rows_per_unit: int,
) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    implementation(x, units).linear_residual_(out, h, weight, bias, gate, index, count, units, rows_per_unit)
    return out


def _fake_linear_residual(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_linear_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h, weight, bias, gate, index, count, ctx.units, ctx.rows_per_unit = inputs
    ctx.save_for_backward(h, weight, bias, gate, index, count)


def _backward_linear_residual(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    h, weight, bias, gate, index, count = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[1:5])
    grads: list[Tensor | None] = [None] * 4
    if any(wanted):
        found = _linear_residual_backward_op(
            grad.contiguous(), h, weight, bias, gate, index, count, ctx.units, ctx.rows_per_unit, wanted
        )
        like = (h, weight, bias, gate)
        grads = [g.to(t.dtype) if want else None for g, t, want in zip(found, like, wanted, strict=True)]
    return grad if ctx.needs_input_grad[0] else None, *grads, *(None,) * 4


def _routed_linear_residual_backward(
    dout: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    index: Tensor,
    count: Tensor,
    units: int,
    rows_per_unit: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation(dout, units).linear_residual_backward(
        dout, h, weight, bias, gate, index, count, units, rows_per_unit, wanted
    )


def _fake_linear_residual_backward(
    dout: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wanted: list[bool] = rest[-1]
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    none = dout.new_empty(0)
    return (
        torch.empty_like(h) if wanted[0] else none,
        h.new_empty(weight.shape) if wanted[1] and weight is not None else none,
        h.new_empty(dout.shape[1:]) if wanted[2] else none,
        dout.new_empty(gate.shape, dtype=wide) if wanted[3] and gate is not None else none,
    )


_ln_linear_backward_op = define_op(
    "routed_ln_linear_backward", _routed_ln_linear_backward, fake=_fake_ln_linear_backward
)
_linear_residual_backward_op = define_op(
    "routed_linear_residual_backward", _routed_linear_residual_backward, fake=_fake_linear_residual_backward
)
ln_linear_op = define_op(
    "routed_ln_linear",
    _routed_ln_linear,
    fake=_fake_ln_linear,
    setup_context=_setup_ln_linear,
    backward=_backward_ln_linear,
)
linear_residual_op = define_op(
    "routed_linear_residual",
    _routed_linear_residual,
    fake=_fake_linear_residual,
    setup_context=_setup_linear_residual,
    backward=_backward_linear_residual,
)


@torch.library.custom_op("xdfast::routed_linear_residual_", mutates_args=("x",))
def linear_residual_op_(
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    index: Tensor,
    count: Tensor,
    units: int,
    rows_per_unit: int,
) -> None:
    """The in-place twin, without autograd."""
    implementation(x, units).linear_residual_(x, h, weight, bias, gate, index, count, units, rows_per_unit)


@linear_residual_op_.register_fake
def _(x: Tensor, *_: Any) -> None:
    return None
