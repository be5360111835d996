"""Routed layers by their equations, in plain differentiable PyTorch of any dtype. Compact rows, host-known counts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "activate",
    "attention_reference",
    "linear_residual_reference",
    "ln_linear_reference",
    "norm_reference",
    "rows_of",
]


def rows_of(index: Tensor, units: int, rows_per_unit: int) -> Tensor:
    """Row numbers [units · rows_per_unit] of the first ``units`` entries of ``index``."""
    first = index[:units].long() * rows_per_unit
    return (first[:, None] + torch.arange(rows_per_unit, device=index.device)).flatten()


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """LayerNorm ("layer"), RMSNorm ("rms") or nothing ("none") over the last dimension; statistics in fp32 at least."""
    if norm == "none":
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype)


def activate(x: Tensor, act: str) -> Tensor:
    """The activation after a linear map; "swiglu" halves the width."""
    if act == "swiglu":
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up
    if act in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    return {"none": lambda t: t, "silu": functional.silu, "relu": functional.relu}[act](x)


def ln_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rows: Tensor,
    norm: str,
    eps: float,
    act: str,
) -> Tensor:
    """act(norm(x[rows]) Wᵀ + b) [n, F]."""
    y = norm_reference(x[rows], norm_weight, norm_bias, norm, eps)
    return activate(functional.linear(y.to(weight.dtype), weight, bias), act)


def linear_residual_reference(
    x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, rows: Tensor, units: Tensor
) -> Tensor:
    """x with x[rows] + gate[units] · (h Wᵀ + b) in the listed rows; ``weight`` None: h itself."""
    y = h if weight is None else functional.linear(h, weight, bias)
    if gate is not None:
        y = gate[units, None].to(y.dtype) * y
    return x.index_add(0, rows, y.to(x.dtype))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, scale: float, causal: bool
) -> Tensor:
    """softmax(s q kᵀ) v sample by sample; rows that no offset reaches are 0."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for b in range(len(offsets_q) - 1):
        rows_q, rows_k = (slice(*offsets[b : b + 2].tolist()) for offsets in (offsets_q, offsets_k))
        keys, values = (t[rows_k].repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[rows_q], keys) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
        out[rows_q] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
    return out
