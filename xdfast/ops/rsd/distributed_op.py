r"""``xdfast::rsd_loss_distributed``: the RSD op over the rows of several ranks.

With weights w_r of a rank's rows, C = Σ_r w_r T_rᵀ S_r. Exact global statistics: columns standardised over all N rows,
w_r = 1/N. Average of the ranks' own correlations: columns standardised over a rank's n_r rows, w_r = 1/(W n_r).
Either way, rows scaled by √w (s' = √w s, folded into 1/std) leave C = T'ᵀS' and, with U' = T'C,

    G' = 2κ U' + T' · diag(2 (c_j − 1 − κ c_j))
    ∂L/∂x = √w_r inv_j (G'_ij − s'_ij ratio_j h_j)

with h_j = Σ_rows G'_ij s'_ij = 2κ Σ_i C_ij² + 2 (c_j − 1 − κ c_j) c_j over all rows for global statistics (known without
another message), and W times the sum over the rank's own rows for averaged ones. ``inv`` and ``ratio`` as in fast.py; the
− mean_i(G_ij) term is zero because T is centred over the rows that the mean of S is taken over.

Column statistics: each rank's mean (hi + lo) and sum of squares M2 about it in its compute dtype, merged in float64 after
Chan: mean = Σ n_r mean_r / N, M2 = Σ M2_r + Σ n_r (mean_r − mean)². One message of 4 D float64. Rows are centred by their own
rank's mean first and then moved by mean_r − mean, so large column means cancel exactly once, as in one process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdfast.ops._cross import column_dots, cross_products
from xdfast.ops._define import define_op
from xdfast.ops._group import agree, resolve
from xdfast.ops.rsd.fast import Outputs, compute_dtype
from xdfast.ops.rsd.op import fake_outputs

__all__ = ["column_moments", "merge_moments", "rsd_loss_distributed_op"]


def column_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred x [n, D], column means [D] and sums of squares about them [D], both float64; zeros for n = 0."""
    if x.shape[0] == 0:
        zeros = x.new_zeros(x.shape[1], dtype=torch.float64)
        return x.clone(), zeros, zeros
    hi = x.mean(0)
    c = x - hi
    lo = c.mean(0)  # one fp32 mean is rounded; see fast.py
    c -= lo
    return c, hi.double() + lo.double(), column_dots(c, c)


def merge_moments(moments: Tensor, counts: list[int], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(mean, M2) of all rows from every rank's. moments [..., 2, D] float64 → two tensors [..., D]."""
    gathered = moments.new_empty(group.size(), *moments.shape)
    dist.all_gather_into_tensor(gathered.view(-1), moments.reshape(-1), group=group)
    means, m2 = gathered.unbind(-2)  # [ranks, ..., D] each
    if min(counts) == max(counts):  # no copy from the host: this way can be captured in a CUDA graph
        mean = means.mean(0)
        spread = (means - mean).square().sum(0) * counts[0]
    else:
        n = moments.new_tensor(counts).view(-1, *[1] * (means.dim() - 1))
        mean = (means * n).sum(0) / n.sum()
        spread = ((means - mean).square() * n).sum(0)
    return mean, m2.sum(0) + spread


def _scales(variance: Tensor, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
    """(inv, ratio) [D] of a variance, as in fast.py; float64."""
    if eps_mode == "std":
        std = variance.sqrt()
        return 1 / (std + eps), torch.where(std == 0, torch.zeros_like(std), (std + eps) / std)
    return (variance + eps).rsqrt(), torch.ones_like(variance)


def _standardised(
    x: Tensor,
    y: Tensor,
    eps: float,
    eps_mode: str,
    counts: list[int],
    weight: float,
    group: dist.ProcessGroup,
    own: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(√weight · standardised rows, √weight · inv, ratio) of both sides; statistics of the ``own`` rows or of all."""
    sides = [column_moments(x), column_moments(y)]
    if own:
        moments = [(mean, m2, x.shape[0]) for _, mean, m2 in sides]
    else:
        message = torch.stack([torch.stack(side[1:]) for side in sides])  # [2, 2, D]
        means, m2s = merge_moments(message, counts, group)
        moments = [(mean, m2, sum(counts)) for mean, m2 in zip(means, m2s)]
    result = []
    for (centred, mean_r, _), (mean, m2, n) in zip(sides, moments):
        inv, ratio = _scales(m2 / n, eps, eps_mode)
        factor = (inv * weight**0.5).to(x.dtype)
        if not own:
            centred += (mean_r - mean).to(x.dtype)
        result.append((centred.mul_(factor), factor, ratio))
    return result


def _rsd_loss_distributed(
    student: Tensor,
    teacher: Tensor,
    kappa: float,
    eps: float,
    eps_mode: str,
    precision: str,
    scale: float,
    need_student: bool,
    need_teacher: bool,
    average: bool,
    ddp_average: bool,
    uneven: bool,
    group: str,
    error: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ranks = resolve(group)
    n, size = student.shape[0], ranks.size()
    counts = [n] * size
    if uneven:
        terms = (
            f"width {student.shape[1]}, student {student.dtype}, teacher {teacher.dtype}, device {student.device.type}, "
            f"kappa {kappa}, eps {eps}, eps_mode {eps_mode}, precision {precision}, scale {scale}, "
            f"statistics {'average' if average else 'global'}, "
            f"ddp_average {ddp_average}, gradient of student {need_student}, gradient of teacher {need_teacher}"
        )
        counts = agree(ranks, student.device, n, terms, error)
    _check_counts(counts, average)

    dtype = compute_dtype(student, teacher)
    weight = 1 / (size * n) if average else 1 / sum(counts)
    (s, inv_s, ratio_s), (t, inv_t, ratio_t) = _standardised(
        student.to(dtype), teacher.to(dtype), eps, eps_mode, counts, weight, ranks, average
    )
    alone = size == 1
    cross = cross_products(s, t, need_student, need_teacher, precision, None if alone else ranks, max(counts))

    invariance = (cross.diagonal - 1).square().sum()
    loss = (invariance + kappa * cross.decorrelation) * scale
    slope = 2 * (cross.diagonal - 1)  # [D]; U may or may not hold the diagonal's part already
    if cross.inside:
        slope = slope - 2 * kappa * cross.diagonal
    factor = scale * size if ddp_average else scale
    grads = [student.new_empty(0, 0), teacher.new_empty(0, 0)]
    sides = [
        (cross.u, t, s, cross.column_sums, inv_s, ratio_s, student.dtype),
        (cross.v, s, t, cross.row_sums, inv_t, ratio_t, teacher.dtype),
    ]
    for index, (product, other, own, sums, inv, ratio, out) in enumerate(sides):
        if product is not None:
            g = product.mul_(2 * kappa).addcmul_(other, slope.to(dtype))
            h = column_dots(g, own) * size if average else 2 * kappa * sums + slope * cross.diagonal
            g.addcmul_(own, (h * ratio).to(dtype), value=-1)
            grads[index] = g.mul_(inv * factor).to(out)
    parts = loss, invariance, cross.decorrelation, cross.diagonal.mean()
    loss, invariance, decorrelation, mean_diagonal = (part.to(dtype) for part in parts)
    return loss, invariance, decorrelation, mean_diagonal, grads[0], grads[1]


def _check_counts(counts: list[int], average: bool) -> None:
    """Every rank has the same ``counts``, so either all of them raise or none."""
    if not average and sum(counts) < 2:
        raise ValueError(
            f"the ranks together must have at least 2 samples, got {counts}: a correlation over the batch is undefined "
            "for fewer; use a larger batch or drop_last=True in the loader"
        )
    if average and min(counts) < 2:
        raise ValueError(
            f"every rank must have at least 2 samples, got {counts}: each rank's own correlation is averaged; use "
            'drop_last=True in the loader, or statistics="global", which needs 2 in all ranks together'
        )


def _fake(student: Tensor, teacher: Tensor, *options: Any) -> Outputs:
    return fake_outputs(student, teacher, *options[5:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[7:9]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    if torch.is_grad_enabled():
        # The saved gradients are numbers to autograd: their own derivative would silently be zero.
        raise RuntimeError(
            "the loss over several ranks has no second derivative (backward with create_graph=True): it would need "
            'another round of communication; use statistics="local", or leave this loss out of the part that is '
            "differentiated twice (take a gradient penalty of the other terms alone)"
        )
    grads = zip(ctx.saved_tensors, ctx.needs)
    return *(saved * grad.to(saved.dtype) if need else None for saved, need in grads), *(None,) * 12


rsd_loss_distributed_op = define_op(
    "rsd_loss_distributed", _rsd_loss_distributed, fake=_fake, setup_context=_setup_context, backward=_backward
)
