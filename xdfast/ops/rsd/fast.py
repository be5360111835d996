r"""RSD loss and gradient without the D×D matrix when N < D: plain PyTorch by matrix-chain order.

With standardised T, S [N, D], P = TᵀS/N, c = diag(P):

    ‖P‖²_F = ⟨S, U⟩ / N²,   U = T(TᵀS) = (TTᵀ)S          U is also what the gradient needs

    L       = Σ_j (c_j − 1)² + κ (‖P‖² − Σ_j c_j²)
    ∂L/∂S   = (2κ/N²) U + T · diag(2/N · (c_j − 1 − κ c_j))   =: G

and through the standardisation s = (x − mean)·inv, inv = 1/(std + ε), r = (std + ε)/std (0 where std = 0, as autograd
of ``torch.std`` has it), with g_j = Σ_i G_ij s_ij / N:

    ∂L/∂x = inv_j (G_ij − s_ij r_j g_j)

The usual − mean_i(G_ij) term is zero because the columns of T are centred. FLOPs of the two products, one gradient:
4 N D min(N, D); both gradients: min(8 N² D, 6 N D²).

Cancellation in ‖P‖² − Σ c²: rank(P) < N, so ‖P‖² ≥ (tr P)²/(N − 1); the off-diagonal part can only be small against
‖P‖² when N approaches D, and from there on P itself is formed and summed element by element.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Standardized", "rsd_forward", "standardize_torch"]

#: (z [N, D], inv [D], ratio [D]) in float32, or float64 for float64 inputs.
Standardized = tuple[Tensor, Tensor, Tensor]


def standardize_torch(x: Tensor, eps: float) -> Standardized:
    """Column standardisation in plain PyTorch.

    The mean is subtracted twice (hi, then the mean of the remainder): one fp32 mean is rounded, and with column means
    of 1e5 standard deviations that rounding alone costs 1e-2 of the gradient.
    """
    c = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    c = c - c.mean(0)
    c -= c.mean(0)
    std = c.square().mean(0).sqrt_()
    inv = 1 / (std + eps)
    ratio = torch.where(std == 0, torch.zeros_like(std), (std + eps) / std)
    return c.mul_(inv), inv, ratio


def rsd_forward(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    kappa: float,
    eps: float,
    need_student: bool,
    need_teacher: bool,
    standardize: Callable[[Tensor, float], Standardized] = standardize_torch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(invariance, decorrelation, mean diagonal, ∂L/∂student, ∂L/∂teacher); a gradient not needed is empty [0]."""
    n, d = student.shape
    s, inv_s, ratio_s = standardize(student, eps)
    t, inv_t, ratio_t = standardize(teacher, eps)
    if s.dtype != t.dtype:  # one float64 input makes the whole op float64
        s, t = s.double(), t.double()
    wanted = int(need_student) + int(need_teacher)
    # FLOPs of the Gram form against the covariance form; see the module docstring.
    gram = (2 * n < d, n < d, 4 * n < 3 * d)[wanted]

    diagonal = _column_dots(s, t) / n
    u = v = s.new_empty(0)  # ∂‖P‖²/∂S · N²/2 and ∂‖P‖²/∂T · N²/2 [N, D], where wanted
    if gram:
        k_t = t @ t.T
        if wanted == 0:
            total = torch.sum(k_t * (s @ s.T)) / n**2
        if need_student:
            u = k_t @ s
            total = _total(s, u) / n**2
        if need_teacher:
            v = (s @ s.T) @ t
            total = _total(t, v) / n**2
        decorrelation = total - diagonal.square().sum()
    else:
        p = t.T @ s  # [D, D], rows are teacher dimensions
        p /= n
        if need_student:
            u = (t @ p).mul_(n)
        if need_teacher:
            v = (s @ p.T).mul_(n)
        p.diagonal().zero_()
        decorrelation = p.square_().sum()
    invariance = (diagonal - 1).square().sum()

    weight = (diagonal - 1 - kappa * diagonal) * (2 / n)  # [D]
    # An op may not return the same tensor twice, so each missing gradient is an empty tensor of its own.
    grad_student, grad_teacher = student.new_empty(0), teacher.new_empty(0)
    if need_student:
        grad_student = _input_gradient(u, t, s, weight, kappa, inv_s, ratio_s).to(student.dtype)
    if need_teacher:
        grad_teacher = _input_gradient(v, s, t, weight, kappa, inv_t, ratio_t).to(teacher.dtype)
    return invariance, decorrelation, diagonal.mean(), grad_student, grad_teacher


def _total(x: Tensor, u: Tensor) -> Tensor:
    """⟨x, u⟩ without an N×D temporary."""
    return torch.dot(x.reshape(-1), u.reshape(-1))


def _column_dots(x: Tensor, y: Tensor) -> Tensor:
    """Σₙ x[n, d] · y[n, d]. Not by einsum: that is D tiny matrix products, 50 to 100 times slower on a CPU from N = 512."""
    return (x * y).sum(0)


def _input_gradient(
    u: Tensor,  # [N, D]; overwritten
    other: Tensor,  # [N, D] standardised other side
    own: Tensor,  # [N, D] standardised own side
    weight: Tensor,  # [D]
    kappa: float,
    inv: Tensor,  # [D]
    ratio: Tensor,  # [D]
) -> Tensor:
    n = own.shape[0]
    g = u.mul_(2 * kappa / n**2).addcmul_(other, weight)
    slope = _column_dots(g, own) / n * ratio
    return g.addcmul_(own, slope, value=-1).mul_(inv)
