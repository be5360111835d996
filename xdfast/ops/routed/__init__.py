"""Functions of routed layers: a residual branch computed for the listed rows alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from xdfast.ops._checks import check_choice
from xdfast.ops.route import RouteList
from xdfast.ops.routed import flops as _flops  # noqa: F401  (registers the FLOP formulas)
from xdfast.ops.routed.attention import attention_op
from xdfast.ops.routed.op import linear_residual_op, linear_residual_op_, ln_linear_op

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "routed_attention",
    "routed_linear_residual",
    "routed_linear_residual_",
    "routed_ln_linear",
    "routed_norm",
    "routed_residual",
    "routed_residual_",
]

NORMS = ("layer", "rms", "none")
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu", "swiglu")


def routed_ln_linear(
    x: Tensor,  # [R, D] or [B, T, D]
    weight: Tensor,  # [F, D]; swiglu: [2F, D]
    bias: Tensor | None,
    route: RouteList,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    act: str = "none",
) -> Tensor:
    r"""The first half of a residual branch, for the listed rows: gather, normalise, multiply, activate.

    .. math:: h_m = \mathrm{act}\big(W \, \mathrm{norm}(x_{r(m)}) + b\big), \qquad
              r(m) = \mathrm{index}[m \,\mathrm{div}\, G] \cdot G + m \bmod G

    with G = ``route.rows_per_unit``. The norm is LayerNorm (γ = ``norm_weight``, β = ``norm_bias``) or RMSNorm, statistics
    in fp32; products run in the dtype of ``weight``. ``act="swiglu"`` takes W = [gate; up] and gives silu(gate) · up.

    Returns:
        [``route.capacity``, F] in the dtype of ``weight``; rows beyond the listed ones mean nothing and may be NaN. No
        gradient reaches rows that are not listed.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: widths that do not fit, a list of another batch, an unknown norm or activation.

    Reference:
        ActDistill, arXiv 2511.18082 (skipped layers); the row list is ours (docs/routed.md).
    """
    flat = _check(x, route)
    check_choice("norm", norm, NORMS)
    check_choice("act", act, ACTIVATIONS)
    _check_tensor("weight", weight, flat)
    if weight.dim() != 2 or weight.shape[1] != flat.shape[1] or (act == "swiglu" and weight.shape[0] % 2):
        raise ValueError(
            f"weight must be [F, {flat.shape[1]}] (swiglu: [2F, …]) for x of width {flat.shape[1]}, got {list(weight.shape)}"
        )
    _check_vector("bias", bias, weight.shape[0], flat)
    return _ln_linear(flat, weight, bias, route, norm_weight, norm_bias, norm, eps, act)


def routed_norm(
    x: Tensor,  # [R, D] or [B, T, D]
    route: RouteList,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """norm(x[rows]) [``route.capacity``, D]: :func:`routed_ln_linear` without the linear map, for any branch behind it."""
    flat = _check(x, route)
    check_choice("norm", norm, NORMS)
    return _ln_linear(flat, None, None, route, norm_weight, norm_bias, norm, eps, "none")


def _ln_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, route: RouteList, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm: str, eps: float, act: str,
) -> Tensor:  # fmt: skip
    width = x.shape[1]
    _check_vector("norm_weight", norm_weight, width, x)
    _check_vector("norm_bias", norm_bias, width, x)
    if norm == "rms" and norm_bias is not None:
        raise ValueError("RMSNorm has no bias; leave norm_bias out")
    weight, bias = _cast(x, weight), _cast(x, bias)
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, norm_weight, norm_bias)
    )
    return ln_linear_op(
        x, weight, bias, norm_weight, norm_bias, route.index, route.count, *_size(route), norm, float(eps), act, save
    )[0]


def routed_linear_residual(
    x: Tensor,  # [R, D] or [B, T, D]
    h: Tensor,  # [capacity, K]
    weight: Tensor,  # [D, K]
    bias: Tensor | None,
    route: RouteList,
) -> Tensor:
    r"""The second half of a residual branch: multiply, gate, add to the listed rows; the others are x's bits.

    .. math:: y_{r(m)} = x_{r(m)} + g_{u(m)} \, (W h_m + b), \qquad
              \frac{\partial L}{\partial g_u} =
              \sum_{m \in u} \Big\langle \frac{\partial L}{\partial y_{r(m)}}, W h_m + b \Big\rangle

    with g = ``route.gate`` (1 where None). The gradient of an unlisted unit's gate is 0: what it would have added is not
    known (see ``explore`` of :class:`xdfast.nn.RoutedStack`).

    Returns:
        A new tensor like x. :func:`routed_linear_residual_` writes into x instead and has no gradient.

    Raises:
        ValueError: widths that do not fit, a list of another batch.
    """
    flat = _check(x, route)
    _check_second(flat, h, weight, bias, route)
    out = linear_residual_op(
        flat, h, _cast(x, weight), _cast(x, bias), route.gate, route.index, route.count, *_size(route)
    )
    return out.view(x.shape)


def routed_linear_residual_(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, route: RouteList) -> Tensor:
    """:func:`routed_linear_residual` in place: for inference, where nothing else holds x.

    Raises:
        RuntimeError: a gradient is recorded, or x cannot be viewed as a matrix [R, D].
    """
    _check_second(_check(x, route), h, weight, bias, route)
    return _in_place(x, h, _cast(x, weight), _cast(x, bias), route)


def routed_residual(x: Tensor, y: Tensor, route: RouteList) -> Tensor:
    """x with ``route.gate`` · y [capacity, D] added to the listed rows: any branch behind :func:`routed_norm`."""
    flat = _check(x, route)
    _check_second(flat, y, None, None, route)
    out = linear_residual_op(flat, y, None, None, route.gate, route.index, route.count, *_size(route))
    return out.view(x.shape)


def routed_residual_(x: Tensor, y: Tensor, route: RouteList) -> Tensor:
    """:func:`routed_residual` in place, without a gradient."""
    _check_second(_check(x, route), y, None, None, route)
    return _in_place(x, y, None, None, route)


def _size(route: RouteList) -> tuple[int, int]:
    """(number of active units, -1 where the host does not know it; rows of a unit)."""
    return -1 if route.units is None else route.units, route.rows_per_unit


def _in_place(x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, route: RouteList) -> Tensor:
    tensors = (x, h, weight, bias, route.gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("the in-place form has no gradient; use the one without the underscore, or torch.no_grad()")
    flat = x.view(-1, x.shape[-1])
    linear_residual_op_(flat, h, weight, bias, route.gate, route.index, route.count, *_size(route))
    return x


def routed_attention(
    q: Tensor,  # [M, H, d]
    k: Tensor,  # [M', H', d]
    v: Tensor,  # [M', H', d]
    offsets_q: Tensor,  # [B + 1] int32
    offsets_k: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    longest: int | None = None,
    uniform: bool = False,
) -> Tensor:
    r"""Softmax attention inside each sample's rows, which lie one after another; samples without rows cost nothing.

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s \, q_i^\top k_j) \, v_j, \qquad i, j \in \text{the same sample}

    Rows of sample b are ``offsets[b] … offsets[b + 1]`` (of a plan: ``route.offsets``). H' divides H: grouped queries
    share the heads of keys and values. ``offsets_k`` None: keys and queries are the same rows. ``longest`` bounds the rows of
    a sample (default: all rows), ``uniform`` says that all samples which have rows have that many: a GPU cannot look without
    waiting, and takes float32 only so.

    Returns:
        [M, H, d] contiguous; rows beyond the last offset mean nothing.

    Raises:
        TypeError: q, k and v are no floating-point tensors of one dtype, offsets no int32 tensors.
        ValueError: shapes or devices that do not fit, causal attention with other keys than queries.
        RuntimeError: on a GPU float32 with samples of different lengths, which flash attention does not take.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, t, q)
        if t.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got {q.dtype} and {t.dtype} of {name}")
        if t.dim() != 3:
            raise ValueError(f"{name} must be [rows, heads, width], got {list(t.shape)}")
    if k.shape != v.shape or q.shape[2] != k.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit: one width, k and v alike, and their "
            "number of heads must divide that of q"
        )
    if causal and offsets_k is not None and offsets_k is not offsets_q:
        raise ValueError("causal attention needs the same rows as queries and keys; leave offsets_k out")
    _check_offsets("offsets_q", offsets_q, q)
    if offsets_k is not None and offsets_k is not offsets_q:
        _check_offsets("offsets_k", offsets_k, q)
    offsets_k = offsets_q if offsets_k is None else offsets_k
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else float(scale)
    if q.device.type == "cuda":
        if q.dtype not in (torch.bfloat16, torch.float16) and uniform and longest:
            return _same_length(q, k, v, longest, scale, causal)
        return _varlen(q, k, v, offsets_q, offsets_k, longest, scale, causal)
    return attention_op(q, k, v, offsets_q, offsets_k, scale, causal)[0]


def _same_length(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float, causal: bool) -> Tensor:
    """As a batch of samples; those beyond the listed ones come out as nonsense and are not read."""
    q4, k4, v4 = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q4, k4, v4, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets_q: Tensor,
    offsets_k: Tensor,
    longest: int | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """torch's variable-length flash attention: lengths stay on the device, and it has its own gradient."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"attention over samples of different lengths takes bfloat16 or float16 on a GPU, got {q.dtype}; use "
            "autocast or a half-precision model, or whole samples as units"
        )
    bounds = (longest or q.shape[0], longest or k.shape[0])
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets_q, offsets_k, *bounds, 0.0, causal, False, scale=scale
    )
    return found[0]


def _cast(x: Tensor, t: Tensor | None) -> Tensor | None:
    """Parameters in autocast's dtype, as F.linear would take them."""
    device = x.device.type
    if t is None or not torch.is_autocast_enabled(device) or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(device))


def _check(x: Tensor, route: RouteList) -> Tensor:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(
            f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [rows, D] or [B, T, D], got {list(x.shape)}")
    if x.device != route.index.device:
        raise ValueError(f"x must be on {route.index.device} like the plan, got {x.device}")
    flat = x.reshape(-1, x.shape[-1])
    rows = route.index.numel() * route.rows_per_unit
    if flat.shape[0] != rows:
        raise ValueError(
            f"the plan is for {route.index.numel()} units of {route.rows_per_unit} rows, {rows} in all, but x "
            f"{list(x.shape)} has {flat.shape[0]}: it was made for another batch"
        )
    return flat


def _check_tensor(name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {t.device}; use {name}.to({str(x.device)!r})")


def _check_vector(name: str, t: Tensor | None, size: int, x: Tensor) -> None:
    if t is None:
        return
    _check_tensor(name, t, x)
    if t.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(t.shape)}")


def _check_offsets(name: str, offsets: Tensor, q: Tensor) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an int32 tensor [B + 1], got {got}")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.device != q.device:
        raise ValueError(f"{name} must have shape [B + 1] on {q.device}, got {list(offsets.shape)} on {offsets.device}")


def _check_second(x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, route: RouteList) -> None:
    width = x.shape[1]
    _check_tensor("h", h, x)
    if weight is not None:
        _check_tensor("weight", weight, x)
    if h.dim() != 2 or (h.shape[1] != width if weight is None else weight.shape != (width, h.shape[1])):
        raise ValueError(
            f"h {list(h.shape)} and weight {None if weight is None else list(weight.shape)} must be [rows, K] and "
            f"[{width}, K] to be added to x of width {width}"
        )
    if h.shape[0] < route.capacity:
        raise ValueError(f"h must hold the {route.capacity} rows of the list, got {list(h.shape)}")
    _check_vector("bias", bias, width, x)
