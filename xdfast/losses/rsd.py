"""RSD: redundancy suppression distillation (arXiv 2507.21844)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_number
from xdfast.ops._group import group_name
from xdfast.ops.rsd import (
    REDUCTIONS,
    PreparedTeacher,
    RSDComponents,
    prepare_teacher,
    rsd_loss,
    rsd_loss_distributed,
)
from xdfast.ops.rsd.fast import PRECISIONS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    The order of arguments is (student, teacher). Statistics are per process by default, as in the paper: two ranks of
    128 are not one batch of 256. With ``statistics="global"`` they are: mean, std, P, loss and gradient are those of
    all rows of all ranks (:func:`xdfast.ops.rsd.rsd_loss_distributed` has the details), in one process the same as
    ``"local"``. Gradients then carry a factor, the number of ranks, that DistributedDataParallel and FSDP divide out
    again. Accumulating gradients over micro-batches enlarges neither: statistics are of one micro-batch.

    Args:
        kappa: κ ≥ 0, weight of the off-diagonal part.
        weight: w ≥ 0.
        eps: ε > 0, added to the biased std.
        reduction: ``"sum"`` (the paper's; grows with D), ``"feature"`` (÷ D) or ``"mean"`` (÷ D²).
        precision: lowest precision of the two matrix products, see :func:`xdfast.rsd_loss`.
        return_components: return :class:`xdfast.ops.rsd.RSDComponents` (loss with weight; invariance,
            decorrelation and mean diagonal without) instead of the loss alone.
        on: what ``xdfast.distill`` feeds it, ``"features"`` or ``"logits"``.
        statistics: ``"local"`` or ``"global"``. Keyword only, as are the next three, which concern ``"global"``:
        group: process group; None is the default group.
        ddp_average: multiply gradients by the number of ranks, for a DDP or FSDP that averages them.
        uneven: ranks may hold different numbers of rows, also none, and an error on one is raised on all; costs a
            message of three integers that the host waits for. False promises equal batches and saves it.

    Shape:
        student, teacher: [N, D], N ≥ 2 (global: in all ranks together), any floating dtype. Output: scalar, float32
        (float64 if an input is).

    Raises:
        ValueError, TypeError: see :func:`xdfast.rsd_loss`; here at construction for bad options, ``group`` with local
            statistics, a prepared teacher with global ones.
        RuntimeError: ranks disagree, or a second derivative of global statistics; see
            :func:`xdfast.ops.rsd.rsd_loss_distributed`.

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
        *,
        statistics: str = "local",
        group: ProcessGroup | str | None = None,
        ddp_average: bool = True,
        uneven: bool = True,
    ) -> None:
        super().__init__(weight)
        self.kappa = check_number("kappa", kappa, minimum=0)
        self.eps = check_number("eps", eps, minimum=0, strict=True)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("precision", precision, ("auto", *PRECISIONS))
        if on not in ("features", "logits"):
            raise ValueError(f"on must be 'features' or 'logits', got {on!r}")
        check_choice("statistics", statistics, ("local", "global"))
        if statistics == "local" and group is not None:
            raise ValueError(
                'group has a meaning only with statistics="global", got statistics="local"; drop one of them'
            )
        self.reduction, self.precision, self.return_components, self.on = reduction, precision, return_components, on
        self.statistics, self.ddp_average, self.uneven = statistics, ddp_average, uneven
        # The name, not the object: a module has to survive deepcopy and pickle, a process group does not.
        self.group = None if group is None else group_name(group)

    def prepare(self, teacher: Tensor) -> PreparedTeacher:
        """The teacher's half of the work for a batch [N, D] that is used repeatedly; pass it as ``teacher``.

        Raises:
            ValueError: with ``statistics="global"``: those of all ranks are not known here.
        """
        if self.statistics == "global":
            raise ValueError(
                'a prepared teacher holds the statistics of one process\'s rows and cannot serve statistics="global"; '
                'pass the teacher\'s embedding itself, or make the loss with statistics="local"'
            )
        return prepare_teacher(teacher, eps=self.eps, precision=self.precision)

    def forward(self, student: Tensor, teacher: Tensor | PreparedTeacher) -> Tensor | RSDComponents:
        if self.statistics == "global":
            # A PreparedTeacher is refused there, on all ranks.
            return rsd_loss_distributed(
                student, teacher, group=self.group, ddp_average=self.ddp_average, uneven=self.uneven, kappa=self.kappa,
                eps=self.eps, reduction=self.reduction, weight=self.weight, precision=self.precision,
                return_components=self.return_components,
            )  # fmt: skip
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
            f"precision={self.precision!r}, statistics={self.statistics!r}"
        )
