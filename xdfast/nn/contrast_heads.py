"""Heads of contrastive distillation: both networks' features as embeddings of one width."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ContrastHeads"]


class ContrastHeads(nn.Module):
    r"""One linear map on each side, g^S and g^T of CRD; used in training only.

    The loss puts what they give on the unit sphere (:class:`xdfast.losses.CRDLoss`). The teacher's head is trained, too; the
    teacher is not. Parameters: (d_s + d_t + 2) · dim.

    Args:
        student_features: d_s.
        teacher_features: d_t.
        dim: width of the embeddings.

    Shape:
        student [N, d_s], teacher [N, d_t]; output a pair of [N, dim].

    Raises:
        ValueError: a width < 1; in use an input of another shape.

    Reference:
        Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, section 3.4.

    Example:
        >>> import torch, xdfast
        >>> [x.shape for x in xdfast.nn.ContrastHeads(64, 192)(torch.randn(4, 64), torch.randn(4, 192))]
        [torch.Size([4, 128]), torch.Size([4, 128])]
    """

    def __init__(self, student_features: int, teacher_features: int, dim: int = 128) -> None:
        super().__init__()
        for name, value in (
            ("student_features", student_features), ("teacher_features", teacher_features), ("dim", dim)
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer (a width), got {value!r}")
        self.student_features, self.teacher_features, self.dim = student_features, teacher_features, dim
        self.student = nn.Linear(student_features, dim)
        self.teacher = nn.Linear(teacher_features, dim)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        for name, x, width in (
            ("student", student, self.student_features), ("teacher", teacher, self.teacher_features)
        ):  # fmt: skip
            if x.dim() != 2 or x.shape[1] != width:
                raise ValueError(f"ContrastHeads expects {name} features of shape [N, {width}], got {list(x.shape)}")
        return self.student(student), self.teacher(teacher)
