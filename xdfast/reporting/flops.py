"""Counted cost: multiply-accumulates and parameters. Nothing here is timed."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from xdfast.ops._flops import missing_formulas
from xdfast.ops.routed.flops import RoutedAttentionMacs, routed_flops_from_fvcore
from xdfast.reporting.adapt import (
    TensorsOut,
    check_size,
    eval_mode,
    example_images,
    network,
    own_image_size,
    run_once,
)

__all__ = ["FlopCount", "ModuleCost", "count_flops"]

#: Operators whose work is multiply-accumulates; torch's own counter knows these and no others.
_PRODUCTS = ("conv", "linear", "matmul", "bmm", "baddbmm", "addmm", "mm", "einsum", "attention")

#: Element-wise and data-moving operators: one or a few operations per element, which the field does not count.
_ELEMENTWISE_NAMES = """
abs add all any arange avg_pool2d bernoulli ceil celu clamp clamp_min copy cos cumsum div dropout elu embedding eq erf exp fill
floor floor_divide gather ge gelu glu gt hardsigmoid hardswish hardtanh index index_add index_put index_select le leaky_relu
log log2 lt masked_fill max max_pool2d mean min mish mul ne neg norm one_hot pad pixel_shuffle pow prelu real reciprocal relu
rms_norm roll rsqrt rsub scatter scatter_add sigmoid sign silu sin softmax log_softmax softplus sqrt square std sub sum tanh
topk sort triu tril var where linalg_vector_norm adaptive_max_pool2d constant_pad_nd
amax clone gather_norm index_fill ones_like repeat_interleave route_plan swiglu unflatten
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


@dataclass(frozen=True)
class ModuleCost:
    """One sub-module: its MACs (those of its children included) and parameters."""

    name: str
    kind: str
    macs: int
    params: int


@dataclass(frozen=True)
class FlopCount:
    """What one forward pass costs, counted by tracing (fvcore), not measured.

    Attributes:
        name: class of the network.
        input_shapes: of the tensors it was traced with.
        macs: multiply-accumulates of the whole batch, as fvcore counts them (it calls them FLOPs): products
            (convolution, linear, matmul, attention) plus its estimate for normalisation and pooling.
        flops: 2 · macs.
        products: the MACs of products alone.
        params: number of parameters.
        trainable: number of those that require a gradient.
        by_operator: operator → MACs.
        by_module: the most expensive blocks, most expensive first.
        elementwise: element-wise operators → calls; by the field's convention they are not counted.
        unsupported: other operators without a formula → calls; the count is too low by their work.
        torch_flops: FLOPs of the same pass by ``torch.utils.flop_counter`` (products only, 2 per MAC).
        relative_difference: abs(2 · products − torch_flops) / torch_flops; None if torch counts nothing.
    """

    name: str
    input_shapes: tuple[tuple[int, ...], ...]
    macs: int
    flops: int
    products: int
    params: int
    trainable: int
    by_operator: dict[str, int] = field(repr=False)
    by_module: tuple[ModuleCost, ...] = field(repr=False)
    elementwise: dict[str, int] = field(repr=False)
    unsupported: dict[str, int]
    torch_flops: int
    relative_difference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def count_flops(
    model: nn.Module,
    image_size: int | None = None,
    batch_size: int = 1,
    inputs: torch.Tensor | tuple[Any, ...] | None = None,
    *,
    top: int = 20,
) -> FlopCount:
    r"""Counts the multiply-accumulates of one forward pass in eval mode, twice: by fvcore and by torch.

    .. math:: \text{FLOPs} = 2 \cdot \text{MACs}, \qquad
              \text{attention: } B H T S (d_{qk} + d_v) \text{ MACs for } QK^\top \text{ and } AV

    Attention is counted dense, whatever its mask: a causal or padded kernel may do less. With grouped queries H is the
    number of query heads. Element-wise operators (softmax, GELU, residual sums) are listed, not counted.

    Args:
        model: any image model; of a wrapper with ``.net`` and ``.prepare`` the network alone is counted.
        image_size: S of the input ``[B, 3, S, S]`` in pixels; default: the model's own.
        batch_size: B. The count is of the whole batch.
        inputs: tensors to trace with instead of images; then ``image_size`` and ``batch_size`` are not used.
        top: how many rows ``by_module`` has at most.

    Returns:
        :class:`FlopCount`. The model is left in the mode it was in.

    Raises:
        TypeError: not a module.
        ValueError: a size that is not a positive whole number, or inputs that the model cannot take.

    Reference:
        fvcore, ``FlopCountAnalysis`` (github.com/facebookresearch/fvcore, docs/flop_count.md).
    """
    net = network(model)
    own = own_image_size(model)
    size: int | None = None
    if inputs is None:
        size = check_size("image_size", own if image_size is None else image_size)
        given: tuple[Any, ...] = (example_images(net, size, check_size("batch_size", batch_size)),)
    else:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
    name = str(getattr(model, "name", None) or type(net).__name__)
    with eval_mode(net), torch.no_grad():
        run_once(name, net, given, size, own)
        attention = RoutedAttentionMacs()
        torch_flops = _torch(net, given, attention)
        operators, modules, missing = _fvcore(net, given, attention)
    macs, products = sum(operators.values()), sum(operators.get(op, 0) for op in _PRODUCTS)
    params = list(net.parameters())
    return FlopCount(
        name=name,
        input_shapes=tuple(tuple(x.shape) for x in given if isinstance(x, torch.Tensor)),
        macs=macs,
        flops=2 * macs,
        products=products,
        params=sum(p.numel() for p in params),
        trainable=sum(p.numel() for p in params if p.requires_grad),
        by_operator=dict(sorted(operators.items(), key=lambda item: -item[1])),
        by_module=_rows(net, modules, top),
        elementwise={op: n for op, n in missing.items() if op.rstrip("_") in _ELEMENTWISE},
        unsupported={op: n for op, n in missing.items() if op.rstrip("_") not in _ELEMENTWISE},
        torch_flops=torch_flops,
        relative_difference=abs(2 * products - torch_flops) / torch_flops if torch_flops else None,
    )


def _fvcore(
    net: nn.Module, inputs: tuple[Any, ...], attention: RoutedAttentionMacs
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """(operator → MACs, module → MACs, operator without formula → calls)."""
    with warnings.catch_warnings():
        # Tracing warns of every Python branch on a shape, and torch of its own deprecated tracer.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(TensorsOut(net), inputs)
        analysis.unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
        analysis.set_op_handle(**_handles(), **routed_flops_from_fvcore(attention))
        operators = {_bare(op): int(n) for op, n in analysis.by_operator().items() if n}
        modules = {m.removeprefix("net.").removeprefix("net"): int(n) for m, n in analysis.by_module().items()}
        missing = Counter[str]()
        for op, calls in analysis.unsupported_ops().items():
            missing[_bare(op)] += calls
    return operators, modules, dict(missing)


def _bare(op: str) -> str:
    return op.rsplit("::", 1)[-1]


def _torch(net: nn.Module, inputs: tuple[Any, ...], attention: RoutedAttentionMacs) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    # The fused inference path of nn.MultiheadAttention and nn.TransformerEncoder is one operator that torch does not count.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter, attention:
            net(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _rows(net: nn.Module, macs: dict[str, int], top: int) -> tuple[ModuleCost, ...]:
    """Blocks: children, with a container's children in its place."""
    blocks: dict[str, nn.Module] = {}
    for name, child in net.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child):
            blocks.update({f"{name}.{inner}": module for inner, module in child.named_children()})
        else:
            blocks[name] = child
    rows = [
        ModuleCost(name, type(module).__name__, macs.get(name, 0), sum(p.numel() for p in module.parameters()))
        for name, module in blocks.items()
    ]
    return tuple(sorted((r for r in rows if r.macs or r.params), key=lambda r: -r.macs)[:top])


# What fvcore has no formula for. A handle gets the traced operator's inputs and outputs (torch._C.Value).


def _handles() -> dict[str, Callable[[list[Any], list[Any]], Counter[str]]]:
    return {"aten::scaled_dot_product_attention": _attention, "aten::baddbmm": _baddbmm}


def _shape(value: Any) -> list[int]:
    shape = value.type().sizes()
    if shape is None:
        raise RuntimeError("an operator was traced without the shape of its input; its FLOPs cannot be counted")
    return list(shape)


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """query [.., H, T, d], key [.., H', S, d], value [.., H', S, v]: QKᵀ and AV, dense."""
    query, key, value = (_shape(x) for x in inputs[:3])
    return Counter(attention=math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """bias + left [B, N, K] · right [B, K, M]."""
    left, right = _shape(inputs[1]), _shape(inputs[2])
    return Counter(baddbmm=math.prod(left) * right[-1])
