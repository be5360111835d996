"""DKD: knowledge distillation decoupled into target and non-target classes (arXiv 2203.08679)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xdfast.losses._inputs import check_logits, full_precision, target_classes
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_number

__all__ = ["DKDLoss"]


@register_loss("dkd")
class DKDLoss(DistillLoss):
    r"""KD's divergence taken apart: target class against all others, and among the others, each with a weight of its own.

    .. math::
        L = w \, \frac{\tau^2}{N} \sum_n \Big[ \alpha \, \mathrm{KL}\big(b^{(t)}_n \| b^{(s)}_n\big)
            + \beta \, \mathrm{KL}\big(\hat p^{(t)}_n \| \hat p^{(s)}_n\big) \Big]

    with p = softmax(logits / τ), b = (p_y, 1 − p_y) for the target class y, and p̂ the softmax over the classes other than
    y. KD itself is α = 1 and β = 1 − p_y of the teacher, for each sample. All from log-probabilities, in float32 for half
    inputs: 1 − p_y does not vanish by rounding.

    With targets that are probabilities (mixup), y is the likeliest class, as in the public code. That code also lets the
    term grow from 0 over the first 20 epochs; this loss has no schedule.

    Args:
        alpha: α ≥ 0, weight of target against others.
        beta: β ≥ 0, weight of the divergence among the others; the paper takes 0.5 to 8, by teacher.
        temperature: τ > 0.
        weight: w ≥ 0.

    Shape:
        student, teacher: logits [N, C], N ≥ 1, C ≥ 2. targets: int64 [N], or probabilities [N, C]. Output: scalar; float32
        for half inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, not 2-D, not floating point; fewer than two classes; targets of
            another shape, no integers, out of range; an option out of range.

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, equation 7.

    Example:
        >>> import torch, xdfast
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> xdfast.create_loss("dkd", beta=8)(student, teacher, torch.randint(10, (8,))).backward()
    """

    on = "logits"
    needs = ("targets",)

    def __init__(self, alpha: float = 1.0, beta: float = 2.0, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.alpha = check_number("alpha", alpha, minimum=0)
        self.beta = check_number("beta", beta, minimum=0)
        self.temperature = check_number("temperature", temperature, minimum=0, strict=True)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        check_logits(student, teacher, min_classes=2)
        target = target_classes(targets, student)[:, None]
        is_target = torch.zeros_like(student, dtype=torch.bool).scatter(1, target, True)  # [N, C]
        of_target, of_others, among = zip(
            *(_decoupled(full_precision(x) / self.temperature, target, is_target) for x in (student, teacher)),
            strict=True,
        )
        tckd = sum((t.exp() * (t - s)).sum(1) for s, t in (of_target, of_others))  # [N]
        s, t = among
        nckd = (t.exp().masked_fill(is_target, 0) * (t - s)).sum(1)
        return (self.alpha * tckd + self.beta * nckd).mean() * (self.weight * self.temperature**2)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, temperature={self.temperature:g}, weight={self.weight:g}"


def _decoupled(logits: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y [N, 1], log(1 − p_y) [N, 1], and log p̂ [N, C] with 0 at y."""
    others = logits.masked_fill(is_target, float("-inf"))
    whole = logits.logsumexp(1, keepdim=True)
    return (
        logits.gather(1, target) - whole,
        others.logsumexp(1, keepdim=True) - whole,
        F.log_softmax(others, dim=1).masked_fill(is_target, 0),
    )
