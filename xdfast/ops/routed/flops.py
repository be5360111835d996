"""FLOPs of the routed ops for torch's counter: what their matrix products cost for ``capacity`` rows.

A counter sees shapes alone: with lists whose length the host knows (the CPU, ``planned``) that is the exact number, in the
list executor the worst case. :mod:`xdfast.nn.routed_flops` counts from the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from xdfast.ops.routed import attention as _attention  # noqa: F401  (registers the op)
from xdfast.ops.routed import op as _op  # noqa: F401  (registers the ops)

__all__: list[str] = []


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


@register_flop_formula(torch.ops.xdfast.routed_attention)
def _attention_flops(q: Any, k: Any, v: Any, offsets_q: Any, offsets_k: Any, *_: Any, **__: Any) -> int:
    """Exact where all samples have the same number of rows (their mean is squared), as with samples for units."""
    return _pairs(q, k, offsets_q) * 2 * 2


@register_flop_formula(torch.ops.xdfast.routed_attention_backward)
def _attention_backward_flops(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, offsets_q: Any, *_: Any, **__: Any
) -> int:
    return _pairs(q, k, offsets_q) * 2 * 5


def _pairs(q: Any, k: Any, offsets: Any) -> int:
    samples = offsets[0] - 1
    return q[0] * k[0] // samples * q[1] * q[2] if samples else 0
