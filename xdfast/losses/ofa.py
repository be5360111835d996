"""OFA: the target-enhanced logit loss of one-for-all distillation (arXiv 2310.19444)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xdfast.losses._inputs import check_logits, full_precision, target_classes
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_number

__all__ = ["OFALoss"]


@register_loss("ofa")
class OFALoss(DistillLoss):
    r"""Cross-entropy with the teacher's probabilities in which a confident teacher adds weight to the target class.

    .. math::
        L = -\frac{w}{N} \sum_n \Big[ \big((1 + p^{(t)}_{ny})^\gamma - 1\big) \log p^{(s)}_{ny}
            + \sum_{c \ne y} p^{(t)}_{nc} \log p^{(s)}_{nc} \Big], \quad p = \mathrm{softmax}(\mathrm{logits} / \tau)

    The paper writes (1 + p)^γ without the −1: it counts the cross-entropy with the label in, which here, as in every
    recipe of xdfast, is a term of its own. γ = 1 is KD (but for the teacher's entropy, which has no gradient). The public
    code also raises the other classes' p to the power γ: ``form="code"``.

    The method uses it on the logits and, through :class:`xdfast.nn.OFAProjector`, at the student's stages: with
    ``xdfast.distill(loss="ofa", taps={"layer1": "logits", …})`` at those taps.

    Args:
        gamma: γ ≥ 0; the paper takes 1 to 1.6, by pair.
        temperature: τ > 0; no factor τ², as in the public code.
        form: ``"paper"`` or ``"code"``.
        weight: w ≥ 0.

    Shape:
        student, teacher: logits [N, C], N ≥ 1. targets: int64 [N], or probabilities [N, C], of which the likeliest class
        counts. Output: scalar; float32 for half inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, not 2-D, not floating point; targets of another shape, no integers,
            out of range; an option out of range.

    Reference:
        Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023,
        arXiv 2310.19444, the OFA loss.

    Example:
        >>> import torch, xdfast
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> xdfast.create_loss("ofa", gamma=1.4)(student, teacher, torch.randint(10, (8,))).backward()
    """

    on = "logits"
    needs = ("targets",)
    at_stages = True

    def __init__(self, gamma: float = 1.0, temperature: float = 1.0, form: str = "paper", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.gamma = check_number("gamma", gamma, minimum=0)
        self.temperature = check_number("temperature", temperature, minimum=0, strict=True)
        self.form = check_choice("form", form, ("paper", "code"))

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        check_logits(student, teacher)
        target = target_classes(targets, student)[:, None]
        # log_softmax: the logarithm of a softmax is -inf in half precision where a probability is below 6e-8
        log_s = F.log_softmax(full_precision(student) / self.temperature, dim=1)
        p = F.softmax(full_precision(teacher) / self.temperature, dim=1)
        others = p if self.form == "paper" else p**self.gamma
        wanted = others.scatter(1, target, torch.expm1(self.gamma * torch.log1p(p.gather(1, target))))
        return -(wanted * log_s).sum(1).mean() * self.weight

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, temperature={self.temperature:g}, form={self.form!r}, weight={self.weight:g}"
