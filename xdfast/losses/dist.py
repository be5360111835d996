"""DIST: correlation of predictions between and within classes (arXiv 2205.10536)."""

from __future__ import annotations

from torch import Tensor

from xdfast.losses._inputs import check_logits, full_precision
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_number

__all__ = ["DISTLoss"]

_EPS = 1e-8  # the public code's, added to the product of the norms


@register_loss("dist")
class DISTLoss(DistillLoss):
    r"""One minus Pearson's correlation of the class probabilities, over the classes of a sample and over the samples of a class.

    .. math::
        L = w \, \tau^2 \Big[ \beta \Big(1 - \frac{1}{N} \sum_n \rho\big(p^{(s)}_{n\cdot}, p^{(t)}_{n\cdot}\big)\Big)
            + \gamma \Big(1 - \frac{1}{C} \sum_c \rho\big(p^{(s)}_{\cdot c}, p^{(t)}_{\cdot c}\big)\Big) \Big], \quad
        p = \mathrm{softmax}(\mathrm{logits} / \tau)

    The second sum compares the batch's samples: it is of the rows of this process, and a batch of one has none. A constant
    row or column correlates with nothing (ρ = 0).

    Args:
        beta: β ≥ 0, weight of the relation between classes (rows).
        gamma: γ ≥ 0, weight of the relation within classes (columns).
        temperature: τ > 0.
        weight: w ≥ 0.

    Shape:
        student, teacher: logits [N, C], N ≥ 2, C ≥ 2. Output: scalar; float32 for half inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, not 2-D, not floating point, one sample or one class only; an
            option out of range.

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536, equations 7 to 10.

    Example:
        >>> import torch, xdfast
        >>> xdfast.create_loss("dist")(torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)).backward()
    """

    on = "logits"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.beta = check_number("beta", beta, minimum=0)
        self.gamma = check_number("gamma", gamma, minimum=0)
        self.temperature = check_number("temperature", temperature, minimum=0, strict=True)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher, min_rows=2, min_classes=2)
        s, t = ((full_precision(x) / self.temperature).softmax(1) for x in (student, teacher))
        loss = self.beta * (1 - _pearson(s, t, 1).mean()) + self.gamma * (1 - _pearson(s, t, 0).mean())
        return loss * (self.weight * self.temperature**2)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}, gamma={self.gamma:g}, temperature={self.temperature:g}, weight={self.weight:g}"


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Correlation along ``dim``."""
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + _EPS)
