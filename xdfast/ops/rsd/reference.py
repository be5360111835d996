"""The cross-correlation loss, literally: truth in tests, the ``"reference"`` backend, the baseline in benchmarks.

Any floating dtype, differentiable to any order by autograd, D×D matrices and all.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_correlation", "rsd_loss_reference", "standardize"]


def standardize(x: Tensor, eps: float, eps_mode: str = "std") -> Tensor:
    """z = (x − mean) / (std + ε) per column, or (x − mean) / √(var + ε); biased. x [N, D] → [N, D]."""
    if eps_mode == "std":
        return (x - x.mean(0)) / (x.std(0, correction=0) + eps)
    return (x - x.mean(0)) / (x.var(0, correction=0) + eps).sqrt()


def cross_correlation(student: Tensor, teacher: Tensor, eps: float, eps_mode: str = "std") -> Tensor:
    """P = z⁽ᵗ⁾ᵀ z⁽ˢ⁾ / N. student, teacher [N, D] → [D, D], rows are teacher dimensions."""
    return standardize(teacher, eps, eps_mode).T @ standardize(student, eps, eps_mode) / student.shape[0]


def rsd_loss_reference(
    student: Tensor, teacher: Tensor, eps: float, eps_mode: str = "std"
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σᵢ (Pᵢᵢ − 1)², Σᵢ≠ⱼ Pᵢⱼ², mean Pᵢᵢ) of [N, D] inputs; the loss is the first plus κ times the second."""
    p = cross_correlation(student, teacher, eps, eps_mode)
    diagonal = p.diagonal()
    off_diagonal = p - torch.diag(diagonal)
    return (diagonal - 1).square().sum(), off_diagonal.square().sum(), diagonal.mean()
