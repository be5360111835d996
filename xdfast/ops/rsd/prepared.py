"""A teacher batch whose part of the RSD loss is computed once and used many times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdfast.ops._checks import check_choice, check_matrix, check_number
from xdfast.ops.rsd.fast import EPS_MODES, PRECISIONS
from xdfast.ops.rsd.op import resolve_precision, rsd_prepare_op

__all__ = ["PreparedTeacher", "prepare_teacher"]


@dataclass(frozen=True)
class PreparedTeacher:
    """What :func:`prepare_teacher` computed; goes where the teacher's embedding goes.

    Attributes:
        features: the teacher's embedding [N, D], detached.
        statistics: [4, D] column mean (high and low part), 1/std and ratio.
        gram: z zᵀ / D [N, N] if N < D, else [0, 0].
        eps, eps_mode, precision: what it was computed with; the loss has to agree.
    """

    features: Tensor
    statistics: Tensor
    gram: Tensor
    eps: float
    eps_mode: str
    precision: str

    def check(self, eps: float, eps_mode: str, precision: str) -> None:
        """Raises ValueError if the loss was made with other settings than the preparation."""
        ours, theirs = (self.eps, self.eps_mode, self.precision), (eps, eps_mode, precision)
        if ours != theirs:
            raise ValueError(
                f"the teacher was prepared with (eps, eps_mode, precision) = {ours}, the loss has {theirs}; "
                "prepare it with the loss's own prepare()"
            )


def prepare_teacher(
    teacher: Tensor,  # [N, D]
    *,
    eps: float = 1e-5,
    eps_mode: str = "std",
    precision: str = "float32",
) -> PreparedTeacher:
    """Computes the teacher's column statistics and, for N < D, its Gram matrix: half of the FLOPs of the RSD loss.

    Worth it where the same teacher batch meets several students, several student layers, or returns in every epoch
    (batches of cached features in a fixed order). Memory: N² for the Gram matrix, 4 D for the statistics.

    Args:
        teacher: [N, D], N ≥ 2, any floating dtype; detached.
        eps, eps_mode, precision: as in :func:`xdfast.rsd_loss`.

    Raises:
        TypeError, ValueError: as in :func:`xdfast.rsd_loss`.

    Example:
        >>> import torch, xdfast
        >>> teacher = xdfast.prepare_teacher(torch.randn(32, 64))
        >>> losses = [xdfast.rsd_loss(torch.randn(32, 64), teacher) for _ in range(3)]
    """
    check_matrix("teacher", teacher, min_rows=2)
    eps = check_number("eps", eps, minimum=0, strict=True)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    check_choice("precision", precision, ("auto", *PRECISIONS))
    precision = resolve_precision(precision, teacher.device.type)
    with torch.no_grad():
        statistics, gram = rsd_prepare_op(teacher.detach(), eps, eps_mode, precision)
    return PreparedTeacher(teacher.detach(), statistics, gram, eps, eps_mode, precision)
