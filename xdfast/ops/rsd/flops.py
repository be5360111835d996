"""FLOPs of the cross-correlation loss, for torch's counter and for fvcore."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from xdfast.ops.rsd import op as _op  # noqa: F401  (registers the op)

__all__ = ["rsd_flops", "rsd_flops_from_fvcore"]


def rsd_flops(n: int, d: int, need_student: bool, need_teacher: bool, has_gram: bool = False) -> int:
    """FLOPs of the matrix products of loss and gradients together, 2 a multiply-add; the rest is O(N D).

    N < D: each Gram matrix 2N²D and each gradient 2N²D; a value alone needs both Gram matrices. N ≥ D: 2ND² for the
    correlation matrix and for each gradient. Symmetry, which saves the C++ backend up to half of a Gram matrix, is not
    subtracted. A prepared teacher (``has_gram``) saves its Gram matrix.
    """
    gradients = int(need_student) + int(need_teacher)
    if n < d:
        grams = (2 if gradients == 0 else gradients) - int(has_gram)
        return 2 * n * n * d * (grams + gradients)
    return 2 * n * d * d * (1 + gradients)


@register_flop_formula(torch.ops.xdfast.rsd_loss)
def _count(
    student: Any, teacher: Any, kappa: Any, eps: Any, eps_mode: Any, precision: Any, scale: Any, *rest: Any, **_: Any
) -> int:
    need_student, need_teacher, _statistics, gram = rest
    n, d = student
    return rsd_flops(n, d, need_student, need_teacher, gram is not None)


def rsd_flops_from_fvcore(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle for fvcore: ``FlopCountAnalysis(...).set_op_handle("xdfast::rsd_loss", rsd_flops_from_fvcore)``.

    fvcore counts a multiply-add once, so this is half of :func:`rsd_flops`; it sees forward passes without gradient.
    """
    n, d = inputs[0].type().sizes()
    return rsd_flops(n, d, False, False) // 2
