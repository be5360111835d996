"""VICReg's variance and covariance terms, literally: truth in tests and the rule for second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["covariance_reference", "variance_reference"]


def variance_reference(x: Tensor, eps: float) -> Tensor:
    """(1/D) Σ_j max(0, 1 − √(var_j + ε)), unbiased variance. x [N, D] → scalar."""
    return torch.relu(1 - (x.var(0) + eps).sqrt()).mean()


def covariance_reference(x: Tensor) -> Tensor:
    """(1/D) Σ_{i≠j} C_ij², C = XcᵀXc / (N − 1). x [N, D] → scalar."""
    centred = x - x.mean(0)
    c = centred.T @ centred / (x.shape[0] - 1)
    off_diagonal = c - torch.diag(c.diagonal())
    return off_diagonal.square().sum() / x.shape[1]
