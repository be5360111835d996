"""The RSD loss as a function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdfast.ops import _backends
from xdfast.ops._checks import check_matrix, check_number, check_pair
from xdfast.ops.rsd.op import reference_components, rsd_loss_op

__all__ = ["REDUCTIONS", "RSDComponents", "rsd_loss"]

#: What the sum over the D×D matrix is divided by.
REDUCTIONS = ("sum", "feature", "mean")


class RSDComponents(NamedTuple):
    """The loss and its parts, all scalars; only ``loss`` carries a gradient.

    Attributes:
        loss: (invariance + κ · decorrelation), reduced.
        invariance: Σᵢ (Pᵢᵢ − 1)², reduced.
        decorrelation: Σᵢ≠ⱼ Pᵢⱼ², reduced, without κ.
        mean_diagonal: mean Pᵢᵢ, in [−1, 1]; 1 is perfect agreement of matched dimensions.
    """

    loss: Tensor
    invariance: Tensor
    decorrelation: Tensor
    mean_diagonal: Tensor


def rsd_loss(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    *,
    kappa: float = 0.01,
    eps: float = 1e-5,
    reduction: str = "sum",
    return_components: bool = False,
) -> Tensor | RSDComponents:
    r"""Redundancy suppression distillation loss.

    .. math::
        z^{(f)} = \frac{f - \mathrm{mean}_N f}{\mathrm{std}_N f + \varepsilon}, \quad
        P = \frac{1}{N} z^{(t)\top} z^{(s)}, \quad
        L = \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2

    The std is biased and ε is added to it. Statistics are those of the batch at hand (one process). Inputs of half
    precision are computed in float32, inside and outside autocast; float64 stays float64. When N < D no D×D matrix is
    formed: 4N²D FLOPs and O(ND) memory for loss and gradient together.

    Args:
        student: student embedding, usually the output of :class:`xdfast.AAD`.
        teacher: teacher embedding. It gets a gradient if it requires one; pass it detached to save that work.
        kappa: weight κ ≥ 0 of the off-diagonal part; 0 is the invariance-only ablation.
        eps: ε > 0.
        reduction: ``"sum"`` over the matrix (the paper's; grows with D), ``"feature"`` divides by D,
            ``"mean"`` by D².
        return_components: also return the parts, as :class:`RSDComponents`.

    Shape:
        student, teacher: [N, D], N ≥ 2, any floating dtype. Output: scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not tensors, integer or complex dtype, ``kappa`` or ``eps`` not a number.
        ValueError: not 2-D, N < 2, shapes or devices that differ, κ < 0, ε ≤ 0, unknown reduction.

    NaN and Inf in the inputs propagate to the loss and gradients. A constant column has a finite gradient, up to
    1/ε times the incoming one: in float16 prefer float32 gradients or a GradScaler. Double backward is exact (it
    differentiates the reference equation, D×D matrices included).

    Reference:
        Zhang et al., "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025,
        arXiv 2507.21844.

    Example:
        >>> import torch, xdfast
        >>> student = torch.randn(32, 64, requires_grad=True)
        >>> loss = xdfast.rsd_loss(student, torch.randn(32, 64))
        >>> loss.backward()
    """
    check_matrix("student", student, min_rows=2)
    check_matrix("teacher", teacher, min_rows=2)
    check_pair("student", student, "teacher", teacher, fix="project the student to the teacher's width with xdfast.AAD")
    kappa = check_number("kappa", kappa, minimum=0)
    eps = check_number("eps", eps, minimum=0, strict=True)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")

    if _backends.forced() == "reference":
        with torch.autocast(device_type=student.device.type, enabled=False):
            parts = reference_components(student, teacher, kappa, eps)
    else:
        grad_mode = torch.is_grad_enabled()
        parts = rsd_loss_op(
            student, teacher, kappa, eps, grad_mode and student.requires_grad, grad_mode and teacher.requires_grad
        )[:4]
    if reduction != "sum":
        scale = 1 / student.shape[1] if reduction == "feature" else 1 / student.shape[1] ** 2
        loss, invariance, decorrelation, mean_diagonal = parts
        parts = (loss * scale, invariance * scale, decorrelation * scale, mean_diagonal)
    return RSDComponents(*parts) if return_components else parts[0]
