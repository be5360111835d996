r"""RSD loss and gradient without the D×D matrix when N < D: plain PyTorch by matrix-chain order.

With standardised T, S [N, D], P = TᵀS/N, c = diag(P):

    ‖P‖²_F = ⟨S, U⟩ / N²,   U = T(TᵀS) = (TTᵀ)S          U is also what the gradient needs

    L       = Σ_j (c_j − 1)² + κ (‖P‖² − Σ_j c_j²)
    ∂L/∂S   = (2κ/N²) U + T · diag(2/N · (c_j − 1 − κ c_j))   =: G

and through the standardisation s = (x − mean)·inv with g_j = Σ_i G_ij s_ij / N and

    ε on the std:       inv = 1/(std + ε),   r = (std + ε)/std (0 where std = 0, as autograd of ``torch.std`` has it)
    ε on the variance:  inv = 1/√(var + ε),  r = 1:

    ∂L/∂x = inv_j (G_ij − s_ij r_j g_j)

The usual − mean_i(G_ij) term is zero because the columns of T are centred. FLOPs of the two products, one gradient:
4 N D min(N, D); both gradients: min(8 N² D, 6 N D²).

Cancellation in ‖P‖² − Σ c²: rank(P) < N, so ‖P‖² ≥ (tr P)²/(N − 1); the off-diagonal part can only be small against
‖P‖² when N approaches D, and from there on P itself is formed and summed element by element.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EPS_MODES", "PRECISIONS", "Outputs", "compute_dtype", "prepare_torch", "rsd_forward", "standardize"]

#: Where ε goes: added to the std (RSD) or to the variance under the root (batch norm, Barlow Twins).
EPS_MODES = ("std", "var")

#: The lowest precision the two matrix products may use; statistics, diagonal, sums and gradients are fp32 regardless.
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")

#: (loss, invariance, decorrelation, mean diagonal, ∂loss/∂student, ∂loss/∂teacher); a gradient not needed is empty.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the inputs is, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def standardize(x: Tensor, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
    """Standardised x [N, D] (fp32 or fp64) and its statistics [4, D]: mean = hi + lo, inv, ratio.

    The mean is subtracted twice (hi, then the mean of the remainder): one fp32 mean is rounded, and with column means
    of 1e5 standard deviations that rounding alone costs 1e-2 of the gradient.
    """
    hi = x.mean(0)
    c = x - hi
    lo = c.mean(0)
    c -= lo
    variance = c.square().mean(0)
    if eps_mode == "std":
        std = variance.sqrt()
        inv = 1 / (std + eps)
        ratio = torch.where(std == 0, torch.zeros_like(std), (std + eps) / std)
    else:
        inv = (variance + eps).rsqrt()
        ratio = torch.ones_like(inv)
    return c.mul_(inv), torch.stack([hi, lo, inv, ratio])


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a @ b with operands rounded to ``precision``, accumulated and returned in their own dtype."""
    if a.dtype == torch.float64 or precision in ("float32", "tf32"):
        return a @ b
    half = getattr(torch, precision)
    if a.is_cuda:
        return torch.mm(a.to(half), b.to(half), out_dtype=a.dtype)
    return (a.to(half) @ b.to(half)).to(a.dtype)  # on the CPU the result is rounded once more


def _gram(z: Tensor, precision: str) -> Tensor:
    """z zᵀ / D. Scaled before the product, so that float16 does not overflow: an entry can reach N · D."""
    z = z * z.shape[1] ** -0.5
    return _product(z, z.T, precision)


def prepare_torch(teacher: Tensor, eps: float, eps_mode: str, precision: str) -> tuple[Tensor, Tensor]:
    """(statistics [4, D], Gram matrix z zᵀ / D [N, N] if N < D, else [0, 0]) of a teacher batch."""
    z, statistics = standardize(teacher.to(compute_dtype(teacher)), eps, eps_mode)
    n, d = z.shape
    return statistics, _gram(z, precision) if n < d else z.new_empty(0, 0)


def rsd_forward(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    kappa: float,
    eps: float,
    eps_mode: str,
    precision: str,
    scale: float,
    need_student: bool,
    need_teacher: bool,
    statistics: Tensor | None = None,  # [4, D] of the teacher
    gram: Tensor | None = None,  # [N, N] of the teacher
) -> Outputs:
    """Loss, parts and gradients; ``scale`` multiplies loss and gradients."""
    n, d = student.shape
    dtype = compute_dtype(student, teacher)
    s, statistics_s = standardize(student.to(dtype), eps, eps_mode)
    if statistics is None:
        t, statistics_t = standardize(teacher.to(dtype), eps, eps_mode)
    else:
        statistics_t = statistics.to(dtype)
        hi, lo, inv, _ = statistics_t
        t = ((teacher.to(dtype) - hi) - lo) * inv
    wanted = int(need_student) + int(need_teacher)
    # FLOPs of the Gram form against the covariance form; see the module docstring.
    gram_form = n < d if gram is not None else (2 * n < d, n < d, 4 * n < 3 * d)[wanted]

    diagonal = _column_dots(s, t) / n
    u = v = s.new_empty(0)  # ∂‖P‖²/∂S · N/2 and ∂‖P‖²/∂T · N/2 [N, D], where wanted
    if gram_form:
        k_t = _gram(t, precision) if gram is None else gram.to(dtype)
        if wanted == 0:
            total = torch.sum(k_t * _gram(s, precision)) * (d / n) ** 2
        if need_student:
            u = _product(k_t, s, precision).mul_(d / n)
            total = _total(s, u) / n
        if need_teacher:
            v = _product(_gram(s, precision), t, precision).mul_(d / n)
            total = _total(t, v) / n
        decorrelation = total - diagonal.square().sum()
    else:
        p = _product(t.T, s, precision)  # [D, D], rows are teacher dimensions
        p /= n
        if need_student:
            u = _product(t, p, precision)
        if need_teacher:
            v = _product(s, p.T, precision)
        p.diagonal().zero_()
        decorrelation = p.square_().sum()
    invariance = (diagonal - 1).square().sum()

    weight = (diagonal - 1 - kappa * diagonal) * (2 / n)  # [D]
    # An op may not return the same tensor twice, so each missing gradient is an empty tensor of its own.
    grad_student, grad_teacher = student.new_empty(0, 0), teacher.new_empty(0, 0)
    if need_student:
        grad_student = _input_gradient(u, t, s, weight, kappa, scale, statistics_s).to(student.dtype)
    if need_teacher:
        grad_teacher = _input_gradient(v, s, t, weight, kappa, scale, statistics_t).to(teacher.dtype)
    loss = (invariance + kappa * decorrelation) * scale
    return loss, invariance, decorrelation, diagonal.mean(), grad_student, grad_teacher


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
    scale: float,
    statistics: Tensor,  # [4, D] of the own side
) -> Tensor:
    n = own.shape[0]
    _, _, inv, ratio = statistics
    g = u.mul_(2 * kappa / n).addcmul_(other, weight)
    slope = _column_dots(g, own) / n * ratio
    return g.addcmul_(own, slope, value=-1).mul_(inv * scale)
