"""RKD: relations between samples, their distances and angles (arXiv 1904.05068)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from xdfast.losses._inputs import full_precision, in_full_precision
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_matrix, check_number

__all__ = ["RKDLoss"]


@register_loss("rkd")
class RKDLoss(DistillLoss):
    r"""Distances between pairs and angles between triplets of samples, the student's against the teacher's.

    .. math::
        L = w \Big[ \frac{w_D}{N^2} \sum_{i,j} \ell\big(\psi^{(t)}_{ij}, \psi^{(s)}_{ij}\big)
            + \frac{w_A}{N^3} \sum_{i,j,k} \ell\big(\cos\angle^{(t)}_{ijk}, \cos\angle^{(s)}_{ijk}\big) \Big]

    with ψ_ij = ‖f_i − f_j‖ over its mean over the pairs i ≠ j, cos∠_ijk = ⟨e_ij, e_kj⟩ with e_ij = (f_i − f_j) / ‖f_i − f_j‖,
    and ℓ Huber's loss with δ = 1. The paper sums over pairs and triplets of different samples; the means here are the public
    code's, to which its weights 25 and 50 belong (all N² and N³ combinations in the denominator; those with i = j or k = j
    add nothing).

    Student and teacher may have different widths: no projector is needed. Relations are between the rows of this process.
    Two equal samples have distance 0, no direction (cos = 0) and no gradient between them. With two samples the angles say
    nothing: their term is 0. Memory and time grow with N² D and N³.

    Args:
        distance_weight: w_D ≥ 0.
        angle_weight: w_A ≥ 0; 0 saves the N³.
        weight: w ≥ 0.

    Shape:
        student [N, D], teacher [N, D'], N ≥ 2. Output: scalar; float32 for half inputs.

    Raises:
        ValueError, TypeError: not 2-D, not floating point, other numbers of samples or devices, one sample only; an option
            out of range.

    Reference:
        Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, equations 4 to 9.

    Example:
        >>> import torch, xdfast
        >>> xdfast.create_loss("rkd")(torch.randn(8, 64, requires_grad=True), torch.randn(8, 192)).backward()
    """

    projection = "none"

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.distance_weight = check_number("distance_weight", distance_weight, minimum=0)
        self.angle_weight = check_number("angle_weight", angle_weight, minimum=0)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_matrix("student", student, min_rows=2)
        check_matrix("teacher", teacher, min_rows=2)
        if len(student) != len(teacher) or student.device != teacher.device:
            raise ValueError(
                "student and teacher must hold the same samples on one device, got "
                f"{list(student.shape)} on {student.device} and {list(teacher.shape)} on {teacher.device}"
            )
        with in_full_precision(student):
            (d_s, cos_s), (d_t, cos_t) = (
                _relations(full_precision(x), self.angle_weight > 0) for x in (student, teacher)
            )
            if d_s.dtype != d_t.dtype:
                d_t, cos_t = d_t.to(d_s.dtype), None if cos_t is None else cos_t.to(d_s.dtype)
            loss = self.distance_weight * F.smooth_l1_loss(d_s, d_t)
            if cos_s is not None and cos_t is not None:
                loss = loss + self.angle_weight * F.smooth_l1_loss(cos_s, cos_t)
        return loss * self.weight

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}, weight={self.weight:g}"


def _relations(x: Tensor, angles: bool) -> tuple[Tensor, Tensor | None]:
    """ψ [N, N], and cos∠ [N, N, N] (vertex first) where asked for."""
    n = len(x)
    difference = x[:, None] - x[None]  # [N, N, D], row i − row j
    squared = difference.square().sum(-1)
    same = squared == 0  # the diagonal, and equal samples; a NaN is not equal to 0 and stays one
    # sqrt has no derivative at 0: those places get a distance of 1 on the way, and 0 afterwards.
    distance = squared.masked_fill(same, 1).sqrt()
    length = distance.masked_fill(same, 0)
    # all samples equal: 0 / 0 would be NaN where there is just nothing to compare
    mean = length.sum() / (n * (n - 1))
    psi = length / mean.masked_fill(mean == 0, 1)
    if not angles:
        return psi, None
    e = (difference / distance[..., None]).masked_fill(same[..., None], 0).transpose(0, 1)  # [j, i] = e_ij
    return psi, e @ e.mT  # [j, i, k] = ⟨e_ij, e_kj⟩
