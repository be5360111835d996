"""FLOPs of the routed ops for torch's counter: what their matrix products cost for ``capacity`` rows.

A counter sees shapes alone: with lists whose length the host knows (the CPU, ``planned``) that is the exact number, in the
list executor the worst case; attention reads its lengths. :mod:`xdfast.nn.routed_flops` counts from the plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from xdfast.ops.routed import attention as _attention  # noqa: F401  (registers the op)
from xdfast.ops.routed import op as _op  # noqa: F401  (registers the ops)

__all__ = ["RoutedAttentionMacs", "attention_pairs", "routed_flops_from_fvcore"]


@register_flop_formula(torch.ops.xdfast.routed_ln_linear)
def _ln_linear(x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    *_bias_and_norm, index, _count, units, rows_per_unit = rest[:7]
    capacity = (units if units >= 0 else index[0]) * rows_per_unit
    return 0 if weight is None else 2 * capacity * weight[0] * weight[1]


@register_flop_formula(torch.ops.xdfast.routed_ln_linear_backward)
def _ln_linear_backward(dout: Any, x: Any, pre: Any, statistics: Any, weight: Any, *rest: Any, **_: Any) -> int:
    if weight is None:
        return 0
    wanted = rest[-1]
    products = int(wanted[1]) + int(wanted[0] or wanted[3] or wanted[4])
    return 2 * products * dout[0] * weight[0] * weight[1]


@register_flop_formula([torch.ops.xdfast.routed_linear_residual, torch.ops.xdfast.routed_linear_residual_])
def _linear_residual(x: Any, h: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 0 if weight is None else 2 * h[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.xdfast.routed_linear_residual_backward)
def _linear_residual_backward(dout: Any, h: Any, weight: Any, *rest: Any, **_: Any) -> int:
    if weight is None:
        return 0
    wanted = rest[-1]
    return 2 * (int(wanted[1]) + int(wanted[0] or wanted[3])) * h[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.xdfast.routed_attention, get_raw=True)
def _attention_flops(q: Any, k: Any, v: Any, offsets_q: Any, offsets_k: Any, *_: Any, **__: Any) -> int:
    return attention_pairs(q, k, offsets_q, offsets_k) * q.shape[1] * q.shape[2] * 2 * 2


@register_flop_formula(torch.ops.xdfast.routed_attention_backward, get_raw=True)
def _attention_backward_flops(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, offsets_q: Any, offsets_k: Any, *_: Any, **__: Any
) -> int:
    return attention_pairs(q, k, offsets_q, offsets_k) * q.shape[1] * q.shape[2] * 2 * 5


def attention_pairs(q: Tensor, k: Tensor, offsets_q: Tensor, offsets_k: Tensor) -> int:
    """Pairs of a query and a key of its sample; of tensors without values, as if all samples had the same number."""
    if isinstance(offsets_q, FakeTensor) or offsets_q.is_meta:
        samples = offsets_q.shape[0] - 1
        return q.shape[0] * k.shape[0] // samples if samples else 0
    return int((offsets_q.diff().long() * offsets_k.diff().long()).sum())


def _packed_linear(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """oneDNN's prepacked linear (:mod:`xdfast.nn.packed`); its weight is opaque, input and output say enough."""
    return 2 * math.prod(x) * out_shape[-1]


# torch counts it from some version on; then that formula stays.
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_packed_linear)


class RoutedAttentionMacs(TorchDispatchMode):
    """Notes the multiply-adds of every variable-length attention that runs within; not around a trace, which it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = func is torch.ops.xdfast.routed_attention.default
        if ours or (func is torch.ops.aten._flash_attention_forward.default and args[3] is not None):
            q, k, _, offsets_q, offsets_k = args[:5]
            self.macs.append(2 * attention_pairs(q, k, offsets_q, offsets_k) * q.shape[1] * q.shape[2])
        return func(*args, **(kwargs or {}))


def routed_flops_from_fvcore(
    attention: RoutedAttentionMacs,
) -> dict[str, Callable[[list[Any], list[Any]], Counter[str]]]:
    """Handles for fvcore, which counts a multiply-add once and sees forward passes without gradient.

    A trace holds the gates of its input: the lists are as long as those ask for. It has no values, so attention's lengths
    are read in a pass before::

        with RoutedAttentionMacs() as attention:
            model(x)
        FlopCountAnalysis(model, x).set_op_handle(**routed_flops_from_fvcore(attention)).total()
    """
    noted = iter(attention.macs)

    def attend(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter(attention=next(noted))

    def packed(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter(linear=_packed_linear(_shape(inputs[0]), out_shape=_shape(outputs[0])) // 2)

    return {
        "xdfast::routed_ln_linear": _traced(_ln_linear, 9),
        "xdfast::routed_linear_residual": _traced(_linear_residual, 3),
        "xdfast::routed_linear_residual_": _traced(_linear_residual, 3),
        "xdfast::routed_attention": attend,
        "aten::_flash_attention_forward": attend,
        "mkldnn::_linear_pointwise": packed,
    }


def _traced(formula: Callable[..., int], arguments: int) -> Callable[..., Counter[str]]:
    """A formula of shapes as a handle of traced values."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter(linear=formula(*(_shape(value) for value in inputs[:arguments])) // 2)

    return handle


def _shape(value: Any) -> Any:
    """Shape of a traced tensor; a constant's value; None."""
    kind = value.type()
    if kind.kind() != "TensorType":
        return value.toIValue()
    shape = kind.sizes()
    if shape is None:
        raise RuntimeError("a routed op was traced without the shape of its input; its FLOPs cannot be counted")
    return list(shape)
