"""The RSD loss of a batch whose rows are spread over the ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdfast.ops._checks import check_choice, check_matrix, check_number, check_pair
from xdfast.ops._group import catch, group_name, is_alone
from xdfast.ops.rsd import REDUCTIONS, RSDComponents, rsd_loss
from xdfast.ops.rsd.distributed_op import rsd_loss_distributed_op
from xdfast.ops.rsd.fast import EPS_MODES, PRECISIONS
from xdfast.ops.rsd.op import resolve_precision
from xdfast.ops.rsd.prepared import PreparedTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STATISTICS", "loss_over_ranks", "rsd_loss_distributed"]

#: What the ranks share: one batch of all their rows, or the average of their own correlation matrices.
STATISTICS = ("global", "average")


def rsd_loss_distributed(
    student: Tensor,  # [n, D], this rank's rows
    teacher: Tensor | PreparedTeacher,  # [n, D]
    *,
    group: ProcessGroup | str | None = None,
    statistics: str = "global",
    ddp_average: bool = True,
    uneven: bool = True,
    kappa: float = 0.01,
    eps: float = 1e-5,
    reduction: str = "sum",
    weight: float = 1.0,
    eps_mode: str = "std",
    precision: str = "float32",
    return_components: bool = False,
) -> Tensor | RSDComponents:
    r"""RSD loss over all ranks of a process group: every rank passes its rows and gets the same loss.

    ``statistics="global"``: exactly the loss of the concatenated batch. With N = Σ_r n_r rows in all,

    .. math::
        z = \frac{f - \mathrm{mean}_N f}{\mathrm{std}_N f + \varepsilon}, \quad
        P = \frac{1}{N} \sum_r z_r^{(t)\top} z_r^{(s)}, \quad
        L = w \Big[ \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2 \Big]

    so 8 ranks of 32 rows see the statistics and the correlations of 256. ``statistics="average"``: every rank
    standardises its own n_r rows, and the loss is that of the mean of the ranks' matrices,
    :math:`\frac{1}{W} \sum_r \frac{1}{n_r} z_r^{(t)\top} z_r^{(s)}`; lightly's Barlow Twins with
    ``gather_distributed=True`` is this one.

    **Gradients and DDP.** The gradient that reaches a rank's rows is ∂L/∂(those rows), L being the one loss of all
    ranks. DistributedDataParallel and FSDP *average* parameter gradients over the W ranks, which would divide it by W;
    with ``ddp_average=True`` it is therefore multiplied by W, and the parameter gradient after DDP equals that of one
    process on the whole batch. Use ``ddp_average=False`` where gradients are summed over ranks, or where the group is
    not the one that DDP averages over. Every rank must scale the returned loss alike.

    **Communication.** Per call: one message of 3 integers (``uneven=True``), one of 4 D float64 statistics (global
    only), then, W · max(n_r) against D, either one all-reduce of the D×D matrix (2 D² elements in a ring; larger
    batches) or one all-gather of the standardised rows (2 W max(n_r) D elements, in bfloat16 or float16 if that is the
    precision; smaller batches) and one all-reduce of up to 3 D float64. Nothing in backward. Memory: O(D²) or O(N D);
    FLOPs 4 n D min(N, D) for one gradient.

    **Gradient accumulation** does not enlarge the batch here: statistics are of one micro-batch over the ranks. The sum
    of the losses of k micro-batches is not the loss of their union.

    With no process group, or with a default group of one process, this is :func:`xdfast.rsd_loss`.

    Args:
        student, teacher: this rank's rows. Ranks may hold different numbers of rows; with global statistics also none:
            pass a tensor of shape [0, D].
        group: the ranks, as a ``torch.distributed.ProcessGroup`` or its ``group_name``; None is the default group. All
            of its ranks must call, the same number of times in the same order.
        statistics: ``"global"`` or ``"average"``, see above.
        ddp_average: multiply gradients by the number of ranks.
        uneven: ranks exchange (n, width, dtypes, options, errors) first, so that numbers of rows may differ, and a rank
            with bad input or other options raises on *all* ranks instead of leaving them waiting. The host waits for
            that message. ``False`` promises equal n and equal everything: no exchange and no host synchronisation,
            which is what capture in a CUDA graph needs; a promise that is broken hangs or computes garbage, and bad
            input raises on its own rank only.
        kappa, eps, reduction, weight, eps_mode, precision, return_components: as in :func:`xdfast.rsd_loss`.

    Shape:
        student, teacher: [n, D] on each rank, the same D and dtypes on all; Σ n ≥ 2 for global statistics, n ≥ 2 on
        every rank for averaged ones. Output: scalar, float32 (float64 if an input is), equal on all ranks.

    Raises:
        TypeError, ValueError: as :func:`xdfast.rsd_loss`, on every rank of the group (``uneven=True``); a
            :class:`xdfast.ops.rsd.PreparedTeacher` (its statistics are one rank's); too few samples; this process is
            no member of ``group``.
        RuntimeError: ranks disagree on width, dtypes, device type, options or on which side wants a gradient; backward
            with ``create_graph=True`` (there is no second derivative).

    Results of different numbers of ranks agree up to the order of sums: 1e-6 relative in float32, whatever the column
    means (statistics are merged in float64).

    Reference:
        Zhang et al., "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025,
        arXiv 2507.21844, for the loss; Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances", 1979, for the merge of statistics.

    Example:
        >>> import torch
        >>> from xdfast.ops.rsd import rsd_loss_distributed
        >>> student = torch.randn(32, 64, requires_grad=True)
        >>> loss = rsd_loss_distributed(student, torch.randn(32, 64))  # the same line under torchrun
        >>> loss.backward()
    """
    check_choice("statistics", statistics, STATISTICS)
    name = group_name(group)
    if is_alone(name):
        _reject_prepared(teacher)
        return rsd_loss(
            student, teacher, kappa=kappa, eps=eps, reduction=reduction, weight=weight, eps_mode=eps_mode,
            precision=precision, return_components=return_components,
        )  # fmt: skip
    return loss_over_ranks(
        student, teacher, ("student", "teacher"), name, statistics, ddp_average, uneven, kappa, eps, reduction, weight,
        eps_mode, precision, return_components,
    )  # fmt: skip


def loss_over_ranks(
    student: Tensor,
    teacher: Tensor | PreparedTeacher,
    names: tuple[str, str],
    group: str,
    statistics: str,
    ddp_average: bool,
    uneven: bool,
    kappa: float,
    eps: float,
    reduction: str,
    weight: float,
    eps_mode: str,
    precision: str,
    return_components: bool,
) -> Tensor | RSDComponents:
    """:func:`rsd_loss_distributed` in a group of several ranks; ``names`` are what errors call the two inputs."""

    rows: Any = teacher

    def check() -> None:
        _reject_prepared(teacher)
        check_matrix(names[0], student, min_rows=0)
        check_matrix(names[1], rows, min_rows=0)
        check_pair(names[0], student, names[1], rows, fix="project both to one width (xdfast.AAD)")
        check_number("kappa", kappa, minimum=0)
        check_number("eps", eps, minimum=0, strict=True)
        check_number("weight", weight, minimum=0)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("eps_mode", eps_mode, EPS_MODES)
        check_choice("precision", precision, ("auto", *PRECISIONS))

    if uneven:
        # Not raised yet: the other ranks are on their way into the exchange, and have to hear of it there.
        error = catch(check)
    else:
        check()
        error = ""
    if error or isinstance(teacher, PreparedTeacher):  # the latter is always an error; mypy cannot know
        student = teacher = torch.empty(0, 1)
        kappa, eps, weight, reduction, precision, eps_mode = 0.0, 1.0, 0.0, "sum", "float32", "std"
    divisor = {"sum": 1, "feature": student.shape[1], "mean": student.shape[1] ** 2}[reduction]
    grads = torch.is_grad_enabled()
    parts = rsd_loss_distributed_op(
        student, teacher, float(kappa), float(eps), eps_mode, resolve_precision(precision, student.device.type),
        float(weight) / divisor, grads and student.requires_grad, grads and teacher.requires_grad,
        statistics == "average", ddp_average, uneven, group, error,
    )[:4]  # fmt: skip
    if not return_components:
        return parts[0]
    loss, invariance, decorrelation, mean_diagonal = parts
    if divisor != 1:
        invariance, decorrelation = invariance / divisor, decorrelation / divisor
    return RSDComponents(loss, invariance, decorrelation, mean_diagonal)


def _reject_prepared(teacher: object) -> None:
    if isinstance(teacher, PreparedTeacher):
        raise ValueError(
            "a prepared teacher holds the statistics of one process's rows and cannot stand for those of all ranks; "
            'pass the teacher\'s embedding [N, D] itself, or use statistics="local"'
        )
