"""Mean squared error between embeddings, the loss of X-Distill's first stage (arXiv 2601.11269)."""

from __future__ import annotations

from torch import Tensor

from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_matrix, check_pair

__all__ = ["FeatureMSELoss"]


@register_loss("mse")
class FeatureMSELoss(DistillLoss):
    r"""Squared distance of embeddings.

    .. math::
        L = \frac{w}{N D} \sum_n \lVert f^{(t)}_n - f^{(s)}_n \rVert^2

    The paper writes the squared norm without 1/D: ``reduction="sample"`` gives exactly that (w/N).

    Args:
        weight: w ≥ 0.
        reduction: ``"mean"`` over samples and features, or ``"sample"`` (mean over samples, sum over features).

    Shape:
        student, teacher: [N, D], N ≥ 1. Output: scalar; float32 for half inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, not 2-D, not floating point; unknown reduction.

    Reference:
        "X-Distill", arXiv 2601.11269, stage 1.
    """

    def __init__(self, weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(weight)
        if reduction not in ("mean", "sample"):
            raise ValueError(f"reduction must be 'mean' or 'sample', got {reduction!r}")
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_matrix("student", student)
        check_matrix("teacher", teacher)
        check_pair("student", student, "teacher", teacher, fix="project the student to the teacher's width")
        student, teacher = (x.float() if x.dtype.itemsize < 4 else x for x in (student, teacher))
        squared = (student - teacher).square()
        distance = squared.mean() if self.reduction == "mean" else squared.sum(1).mean()
        return distance * self.weight

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, reduction={self.reduction!r}"
