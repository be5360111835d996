"""What xdfast is compared with, each under its own name. All take (student, teacher) [N, D] and return the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["bare_gradient", "gemm_floor", "lightly_style", "literal"]


def literal(student: Tensor, teacher: Tensor, kappa: float = 0.01, eps: float = 1e-5) -> Tensor:
    """The D×D formulation as the public RSD code has it: boolean mask over the off-diagonal, then a sum."""
    z_s = (student - student.mean(0)) / (student.std(0, unbiased=False) + eps)
    z_t = (teacher - teacher.mean(0)) / (teacher.std(0, unbiased=False) + eps)
    p = torch.mm(z_t.T, z_s) / student.shape[0]
    identity = torch.eye(p.shape[0], device=p.device, dtype=p.dtype)
    loss = (p - identity).pow(2)
    loss[(1 - identity).bool()] *= kappa
    return loss.sum()


def lightly_style(student: Tensor, teacher: Tensor, kappa: float = 0.01) -> Tensor:
    """Barlow Twins as self-supervised libraries write it: batch norm, D×D product, off-diagonal by a strided view."""
    z_s = torch.nn.functional.batch_norm(student, None, None, training=True)
    z_t = torch.nn.functional.batch_norm(teacher, None, None, training=True)
    c = (z_t.T @ z_s) / student.shape[0]
    d = c.shape[0]
    on = torch.diagonal(c).sub(1).square().sum()
    off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten().square().sum()
    return on + kappa * off


def bare_gradient(wanted: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call of ``torch.autograd.grad`` whose rule computes nothing (a sum's gradient is a view of one number): what PyTorch asks
    of the backward pass of any loss, however fast its arithmetic."""
    loss = wanted[0].sum()
    for x in wanted[1:]:
        loss = loss + x.sum()
    return lambda: torch.autograd.grad(loss, wanted, retain_graph=True)


def gemm_floor(student: Tensor, teacher: Tensor, small: Tensor, large: Tensor) -> None:
    """The two products of one gradient alone, in the cheaper order, into memory that is there already: no exact
    implementation that multiplies the full matrices goes below. ``small`` [min(N, D)]², ``large`` [N, D]."""
    if student.shape[0] < student.shape[1]:
        torch.mm(teacher, teacher.T, out=small)
        torch.mm(small, student, out=large)
    else:
        torch.mm(teacher.T, student, out=small)
        torch.mm(teacher, small, out=large)
