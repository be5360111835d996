"""KD: knowledge distillation by softened probabilities (arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_matrix, check_number, check_pair

__all__ = ["KDLoss"]


@register_loss("kd")
class KDLoss(DistillLoss):
    r"""Kullback-Leibler divergence from the student's to the teacher's softened class probabilities.

    .. math::
        L = w \, \frac{\tau^2}{N} \sum_n \sum_c p^{(t)}_{nc} \log \frac{p^{(t)}_{nc}}{p^{(s)}_{nc}}, \quad
        p = \mathrm{softmax}(\mathrm{logits} / \tau)

    τ² keeps the gradient's scale independent of τ. Computed from log-probabilities in float32 for half inputs, so it
    does not overflow.

    Args:
        temperature: τ > 0.
        weight: w ≥ 0.

    Shape:
        student, teacher: logits [N, C], N ≥ 1. Output: scalar.

    Raises:
        ValueError, TypeError: shapes or devices differ, not 2-D, not floating point; τ ≤ 0.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.
    """

    on = "logits"

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = check_number("temperature", temperature, minimum=0, strict=True)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_matrix("student", student)
        check_matrix("teacher", teacher)
        check_pair("student", student, "teacher", teacher, fix="both models must have the same classes")
        log_s, log_t = (
            F.log_softmax((x.float() if x.dtype.itemsize < 4 else x) / self.temperature, dim=1)
            for x in (student, teacher)
        )
        divergence = F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
        return divergence * (self.weight * self.temperature**2)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, weight={self.weight:g}"
