"""Barlow Twins (arXiv 2103.03230) by the same op as RSD."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_matrix, check_number, check_pair
from xdfast.ops._group import is_alone
from xdfast.ops.rsd import rsd_loss
from xdfast.ops.rsd.distributed import loss_over_ranks
from xdfast.ops.rsd.fast import PRECISIONS

__all__ = ["BarlowTwinsLoss"]

_EPS = 1e-5  # F.batch_norm's default, on the variance


@register_loss("barlow-twins")
class BarlowTwinsLoss(DistillLoss):
    r"""Cross-correlation of two views pulled to the identity; call, defaults and values of lightly's class of that name.

    .. math::
        L = \sum_i (C_{ii} - 1)^2 + \lambda \sum_{i \ne j} C_{ij}^2, \quad
        C = \frac{1}{N} \hat z_a^\top \hat z_b, \quad \hat z = \frac{z - \mathrm{mean}}{\sqrt{\mathrm{var} + 10^{-5}}}

    with the biased variance over the batch, as ``F.batch_norm`` has it. Both views get a gradient. Loss and gradients
    come from one pass, without the D×D matrix when N < D. Differences to lightly: half inputs are computed in float32
    and give a float32 loss, also inside autocast; bad input raises with a message; and the extras below.

    It is a distillation loss too (``xdfast.create_loss("barlow-twins")``, z_a = projected student, z_b = teacher; a
    detached teacher costs no gradient). It then differs from :class:`xdfast.RSDLoss` by λ and by where ε is added.

    Args:
        lambda_param: λ ≥ 0, weight of the off-diagonal part.
        gather_distributed: average C over the ranks of the default process group before the loss is taken, each rank
            standardising its own batch (lightly's). Gradients are then multiplied by the number of ranks, which
            DistributedDataParallel divides out again. Without a process group it changes nothing.
        precision: lowest precision of the matrix products, see :func:`xdfast.rsd_loss`. Keyword only, as are the others.
        statistics: with ``gather_distributed``, ``"local"``: as above; ``"global"``: mean, var and C of the rows of
            all ranks, the loss of one process on the whole batch.
        weight: w ≥ 0, factor before the loss.

    Shape:
        z_a, z_b: [N, D], N ≥ 2 (on every rank; ``"global"``: in all ranks together), any floating dtype. Output:
        scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not tensors, integer or complex dtype; an option of the wrong type.
        ValueError: not 2-D, shapes or devices that differ, too few samples; ``statistics="global"`` without
            ``gather_distributed``; an unknown option. Among several ranks an error is raised on all of them.
        RuntimeError: ranks disagree on width, dtypes or options; ``gather_distributed`` in a torch without
            torch.distributed; a second derivative over several ranks.

    Reference:
        Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv 2103.03230,
        algorithm 1.

    Example:
        >>> import torch, xdfast
        >>> criterion = xdfast.BarlowTwinsLoss()
        >>> z_a, z_b = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128, requires_grad=True)
        >>> criterion(z_a, z_b).backward()
    """

    def __init__(
        self,
        lambda_param: float = 5e-3,
        gather_distributed: bool = False,
        *,
        precision: str = "float32",
        statistics: str = "local",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.lambda_param = check_number("lambda_param", lambda_param, minimum=0)
        check_choice("precision", precision, ("auto", *PRECISIONS))
        check_choice("statistics", statistics, ("local", "global"))
        if statistics == "global" and not gather_distributed:
            raise ValueError(
                'statistics="global" needs the other ranks, got gather_distributed=False; set gather_distributed=True'
            )
        if gather_distributed and not dist.is_available():
            raise RuntimeError(
                "gather_distributed=True needs torch.distributed, which this torch was built without; "
                "use gather_distributed=False or another build of torch"
            )
        self.gather_distributed, self.precision, self.statistics = gather_distributed, precision, statistics

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if self.gather_distributed and not is_alone(""):
            statistics = "global" if self.statistics == "global" else "average"
            loss = loss_over_ranks(
                z_a, z_b, ("z_a", "z_b"), "", statistics, True, True, self.lambda_param, _EPS, "sum", self.weight, "var",
                self.precision, False,
            )  # fmt: skip
        else:
            check_matrix("z_a", z_a, min_rows=2)
            check_matrix("z_b", z_b, min_rows=2)
            check_pair("z_a", z_a, "z_b", z_b, fix="project both to one width (xdfast.AAD)")
            loss = rsd_loss(
                z_a,
                z_b,
                kappa=self.lambda_param,
                eps=_EPS,
                weight=self.weight,
                eps_mode="var",
                precision=self.precision,
            )
        return loss  # type: ignore[return-value]  # not RSDComponents: return_components is False

    def extra_repr(self) -> str:
        return (
            f"lambda_param={self.lambda_param:g}, gather_distributed={self.gather_distributed}, "
            f"precision={self.precision!r}, statistics={self.statistics!r}, weight={self.weight:g}"
        )
