"""RSD: redundancy suppression distillation (arXiv 2507.21844)."""

from __future__ import annotations

from torch import Tensor

from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_number
from xdfast.ops.rsd import REDUCTIONS, PreparedTeacher, RSDComponents, prepare_teacher, rsd_loss
from xdfast.ops.rsd.fast import PRECISIONS

__all__ = ["RSDLoss"]


@register_loss("rsd", on="features")
@register_loss("rsd-logits", on="logits")
class RSDLoss(DistillLoss):
    r"""Pulls the cross-correlation matrix of student and teacher embeddings to the identity.

    .. math::
        L = w \Big[ \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2 \Big], \quad
        P = \frac{1}{N} z^{(t)\top} z^{(s)}

    with columns standardised over the batch, z = (f − mean) / (std + ε). The drop-in use is
    ``loss = cross_entropy + criterion(aad(student_features), teacher_features)`` with ``weight=0.1``, the paper's λ.
    On two logit matrices it is the paper's logit distiller. ``kappa=0`` is the invariance-only ablation;
    :class:`xdfast.AAD` with ``expansion=0`` the one without AAD.

    The order of arguments is (student, teacher). Statistics are per process, as in the paper: two ranks of 128 are
    not one batch of 256.

    Args:
        kappa: κ ≥ 0, weight of the off-diagonal part.
        weight: w ≥ 0.
        eps: ε > 0, added to the biased std.
        reduction: ``"sum"`` (the paper's; grows with D), ``"feature"`` (÷ D) or ``"mean"`` (÷ D²).
        precision: lowest precision of the two matrix products, see :func:`xdfast.rsd_loss`.
        return_components: return :class:`xdfast.ops.rsd.RSDComponents` (loss with weight; invariance,
            decorrelation and mean diagonal without) instead of the loss alone.
        on: what ``xdfast.distill`` feeds it, ``"features"`` or ``"logits"``.

    Shape:
        student, teacher: [N, D], N ≥ 2, any floating dtype. Output: scalar, float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: see :func:`xdfast.rsd_loss`; here at construction for bad options.

    Reference:
        Zhang et al., "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025,
        arXiv 2507.21844, equations of "RSD loss"; defaults of the public code.

    Example:
        >>> import torch, xdfast
        >>> criterion, aad = xdfast.RSDLoss(weight=0.1), xdfast.AAD(512, 768)
        >>> student, teacher = torch.randn(32, 512), torch.randn(32, 768)
        >>> criterion(aad(student), teacher).backward()
    """

    default_weight = 0.1

    def __init__(
        self,
        kappa: float = 0.01,
        weight: float = 1.0,
        eps: float = 1e-5,
        reduction: str = "sum",
        precision: str = "float32",
        return_components: bool = False,
        on: str = "features",
    ) -> None:
        super().__init__(weight)
        self.kappa = check_number("kappa", kappa, minimum=0)
        self.eps = check_number("eps", eps, minimum=0, strict=True)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("precision", precision, ("auto", *PRECISIONS))
        if on not in ("features", "logits"):
            raise ValueError(f"on must be 'features' or 'logits', got {on!r}")
        self.reduction, self.precision, self.return_components, self.on = reduction, precision, return_components, on

    def prepare(self, teacher: Tensor) -> PreparedTeacher:
        """The teacher's half of the work for a batch [N, D] that is used repeatedly; pass it as ``teacher``."""
        return prepare_teacher(teacher, eps=self.eps, precision=self.precision)

    def forward(self, student: Tensor, teacher: Tensor | PreparedTeacher) -> Tensor | RSDComponents:
        return rsd_loss(
            student,
            teacher,
            kappa=self.kappa,
            eps=self.eps,
            reduction=self.reduction,
            weight=self.weight,
            precision=self.precision,
            return_components=self.return_components,
        )

    def extra_repr(self) -> str:
        return (
            f"kappa={self.kappa:g}, weight={self.weight:g}, eps={self.eps:g}, reduction={self.reduction!r}, "
            f"precision={self.precision!r}"
        )
