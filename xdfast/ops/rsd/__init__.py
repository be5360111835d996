"""The RSD loss as a function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from xdfast.ops import _backends
from xdfast.ops._checks import check_choice, check_matrix, check_number, check_pair
from xdfast.ops.rsd import flops as _flops  # noqa: F401  (registers the FLOP formula)
from xdfast.ops.rsd.fast import EPS_MODES, PRECISIONS
from xdfast.ops.rsd.op import reference_components, resolve_precision, rsd_parts
from xdfast.ops.rsd.prepared import PreparedTeacher, prepare_teacher

__all__ = ["REDUCTIONS", "PreparedTeacher", "RSDComponents", "prepare_teacher", "rsd_loss", "rsd_loss_distributed"]

#: What the sum over the D×D matrix is divided by.
REDUCTIONS = ("sum", "feature", "mean")


class RSDComponents(NamedTuple):
    """The loss and its parts, all scalars; only ``loss`` carries a gradient.

    Attributes:
        loss: weight · (invariance + κ · decorrelation), reduced.
        invariance: Σᵢ (Pᵢᵢ − 1)², reduced.
        decorrelation: Σᵢ≠ⱼ Pᵢⱼ², reduced, without κ.
        mean_diagonal: mean Pᵢᵢ, in [−1, 1]; 1 is perfect agreement of matched dimensions.
    """

    loss: Tensor
    invariance: Tensor
    decorrelation: Tensor
    mean_diagonal: Tensor


@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor | PreparedTeacher,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: str = ...,
    weight: float = ...,
    eps_mode: str = ...,
    precision: str = ...,
    return_components: Literal[False] = ...,
) -> Tensor: ...
@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor | PreparedTeacher,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: str = ...,
    weight: float = ...,
    eps_mode: str = ...,
    precision: str = ...,
    return_components: Literal[True],
) -> RSDComponents: ...
@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor | PreparedTeacher,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: str = ...,
    weight: float = ...,
    eps_mode: str = ...,
    precision: str = ...,
    return_components: bool,
) -> Tensor | RSDComponents: ...
def rsd_loss(
    student: Tensor,  # [N, D]
    teacher: Tensor | PreparedTeacher,  # [N, D]
    *,
    kappa: float = 0.01,
    eps: float = 1e-5,
    reduction: str = "sum",
    weight: float = 1.0,
    eps_mode: str = "std",
    precision: str = "float32",
    return_components: bool = False,
) -> Tensor | RSDComponents:
    r"""Redundancy suppression distillation loss: a cross-correlation matrix pulled to the identity.

    .. math::
        z^{(f)} = \frac{f - \mathrm{mean}_N f}{\mathrm{std}_N f + \varepsilon}, \quad
        P = \frac{1}{N} z^{(t)\top} z^{(s)}, \quad
        L = w \Big[ \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2 \Big]

    The std is biased and ε is added to it. Statistics are those of the batch at hand (one process; for all processes
    see :func:`xdfast.ops.rsd.rsd_loss_distributed`). Inputs of half precision are computed in float32, inside and
    outside autocast; float64 stays float64. Loss and gradients come from one pass: when N < D no D×D matrix is formed,
    4N²D FLOPs and O(ND) memory together.

    Args:
        student: student embedding, usually the output of :class:`xdfast.AAD`.
        teacher: teacher embedding. It gets a gradient if it requires one; pass it detached to save that work. A
            batch that is used repeatedly can be prepared once: :func:`xdfast.prepare_teacher`.
        kappa: weight κ ≥ 0 of the off-diagonal part; 0 is the invariance-only ablation.
        eps: ε > 0.
        reduction: ``"sum"`` over the matrix (the paper's; grows with D), ``"feature"`` divides by D,
            ``"mean"`` by D².
        weight: w ≥ 0, folded into loss and gradient at no cost.
        eps_mode: ``"std"``: z = (f − mean) / (std + ε) as in RSD; ``"var"``: z = (f − mean) / √(var + ε) as in batch
            norm and Barlow Twins.
        precision: the lowest precision the two matrix products may use: ``"float32"``, ``"tf32"``, ``"bfloat16"``,
            ``"float16"``, or ``"auto"``: autocast's dtype inside autocast, else what
            ``torch.set_float32_matmul_precision`` says. A backend without it uses the next higher one (C++: bfloat16
            where the CPU has AVX512-BF16 or AMX, else float32). Statistics, diagonal and gradient are float32 always.
        return_components: also return the parts, as :class:`RSDComponents`.

    Shape:
        student, teacher: [N, D], N ≥ 2, any floating dtype and strides. Output: scalar, float32 (float64 if an input
        is).

    Raises:
        TypeError: not tensors, integer or complex dtype, ``kappa``, ``eps`` or ``weight`` not a number.
        ValueError: not 2-D, N < 2, shapes or devices that differ, κ < 0, ε ≤ 0, unknown option, a teacher prepared
            with other settings.

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
    statistics = gram = None
    check_matrix("student", student, min_rows=2)
    kappa, eps, weight = _check_options(kappa, eps, weight, reduction, eps_mode, precision)
    precision = resolve_precision(precision, student.device.type)
    if isinstance(teacher, PreparedTeacher):
        teacher.check(eps, eps_mode, precision)
        statistics, gram = teacher.statistics, teacher.gram if teacher.gram.numel() else None
        teacher = teacher.features
    else:
        check_matrix("teacher", teacher, min_rows=2)
    check_pair("student", student, "teacher", teacher, fix="project the student to the teacher's width with xdfast.AAD")

    divisor = {"sum": 1, "feature": student.shape[1], "mean": student.shape[1] ** 2}[reduction]
    scale = weight / divisor
    if _backends.forced() == "reference":
        parts = reference_components(student, teacher, kappa, eps, eps_mode, scale)
    else:
        parts = rsd_parts(student, teacher, kappa, eps, eps_mode, precision, scale, statistics, gram)
    if not return_components:
        return parts[0]
    loss, invariance, decorrelation, mean_diagonal = parts
    if divisor != 1:
        invariance, decorrelation = invariance / divisor, decorrelation / divisor
    return RSDComponents(loss, invariance, decorrelation, mean_diagonal)


def _options(
    kappa: float, eps: float, weight: float, reduction: str, eps_mode: str, precision: str
) -> tuple[float, float, float]:
    kappa = check_number("kappa", kappa, minimum=0)
    eps = check_number("eps", eps, minimum=0, strict=True)
    weight = check_number("weight", weight, minimum=0)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    check_choice("precision", precision, ("auto", *PRECISIONS))
    return kappa, eps, weight


_options_once = lru_cache(maxsize=64, typed=True)(_options)  # a training loop asks the same again and again


def _check_options(*options: Any) -> tuple[float, float, float]:
    if torch.compiler.is_compiling():
        return _options(*options)
    try:
        return _options_once(*options)
    except TypeError:  # of a value that cannot be hashed: its own error
        return _options(*options)


# Last, because it is built on the names above.
from xdfast.ops.rsd.distributed import rsd_loss_distributed  # noqa: E402
