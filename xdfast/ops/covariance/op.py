r"""``xdfast::variance_covariance``: VICReg's two regularisers of one view and their gradient, without D×D if N < D.

With Z = Xc / √(N − 1) [N, D], C = ZᵀZ, σ_j = √(C_jj + ε):

    V = (1/D) Σ_j max(0, 1 − σ_j),   K = (1/D) Σ_{i≠j} C_ij² = (‖ZZᵀ‖²_F − Σ_j C_jj²) / D
    ∂K/∂Z = (4/D) (Z C − Z diag(C)),   Z C = (Z Zᵀ) Z,   ∂V/∂Z = −(1/D) Z diag([σ_j < 1] / σ_j)
    ∂/∂x = (∂/∂Z) / √(N − 1)

The − mean_i term of the centring is zero because Z is centred. Rows of several ranks: as in ops/_cross.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdfast.ops._cross import cross_products
from xdfast.ops._define import define_op
from xdfast.ops._group import agree, resolve
from xdfast.ops.covariance.reference import covariance_reference, variance_reference
from xdfast.ops.rsd.distributed_op import column_moments, merge_moments
from xdfast.ops.rsd.fast import compute_dtype

__all__ = ["variance_covariance_op"]


def _variance_covariance(
    x: Tensor,  # [n, D]
    variance_weight: float,
    covariance_weight: float,
    eps: float,
    need_grad: bool,
    over_ranks: bool,
    error: str,
) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    ranks, counts = None, [n]
    if over_ranks:
        ranks = resolve("")
        terms = (
            f"width {d}, dtype {x.dtype}, device {x.device.type}, eps {eps}, weight of the variance {variance_weight}, "
        )
        terms += f"weight of the covariance {covariance_weight}, gradient {need_grad}"
        counts = agree(ranks, x.device, n, terms, error)
    total = sum(counts)

    dtype = compute_dtype(x)
    centred, own_mean, m2 = column_moments(x.to(dtype))
    if ranks is not None:
        mean, m2 = merge_moments(torch.stack([own_mean, m2]), counts, ranks)
        centred += (own_mean - mean).to(dtype)
    z = centred.mul_((total - 1) ** -0.5)
    std = (m2 / (total - 1) + eps).sqrt()
    cross = cross_products(z, z, need_grad, False, "float32", ranks, max(counts))
    loss = variance_weight * torch.relu(1 - std).mean() + covariance_weight * cross.decorrelation / d

    grad = x.new_empty(0, 0)
    if cross.u is not None:
        slope = -variance_weight / d * (std < 1).double() / std
        if cross.inside:
            slope -= 4 * covariance_weight / d * cross.diagonal
        grad = cross.u.mul_(4 * covariance_weight / d).addcmul_(z, slope.to(dtype))
        grad = grad.mul_(len(counts) * (total - 1) ** -0.5).to(x.dtype)
    return loss.to(dtype), grad


def _fake(
    x: Tensor,
    variance_weight: float,
    covariance_weight: float,
    eps: float,
    need_grad: bool,
    over_ranks: bool,
    error: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=compute_dtype(x)), x.new_empty(x.shape if need_grad else (0, 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.variance_weight, ctx.covariance_weight, ctx.eps, ctx.need_grad, ctx.over_ranks, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, saved = ctx.saved_tensors
    if grad is None or not ctx.need_grad:
        return (None,) * 7
    if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a number to autograd
        if ctx.over_ranks:
            raise RuntimeError(
                "the variance and covariance terms over several ranks have no second derivative (backward with "
                "create_graph=True); use gather_distributed=False, or leave this loss out of the part that is "
                "differentiated twice"
            )
        y = x.to(compute_dtype(x))
        loss = ctx.variance_weight * variance_reference(y, ctx.eps) + ctx.covariance_weight * covariance_reference(y)
        (saved,) = torch.autograd.grad(loss, x, create_graph=True)
    return saved * grad.to(saved.dtype), *(None,) * 6


variance_covariance_op = define_op(
    "variance_covariance", _variance_covariance, fake=_fake, setup_context=_setup_context, backward=_backward
)
