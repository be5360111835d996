"""A router that keeps a FLOP budget at every update by construction: its logits are counted from where the budget ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xdfast.ops._checks import check_number
from xdfast.ops._costs import SLACK, Costs, check_always_on, check_reachable, check_target, cost_table

__all__ = ["BudgetShift", "budget_shift"]


def budget_shift(logits: Tensor, costs: Tensor, budget: float | Tensor) -> Tensor:
    r"""Where a batch's logits have to be cut, so that what is above costs as much as the budget allows.

    .. math::
        s = \tfrac12 (z_{(k)} + z_{(k+1)}), \quad k = \max \Big\{ k : \sum_{i \le k} c_{(i)} \le B \Big\}

    with all decisions of all units of the batch sorted by logit, the largest first. Where nothing fits s lies 1 above the largest
    logit, where everything does 1 below the smallest. Equal logits at the cut are all off. Nothing is read back from a GPU.

    Args:
        logits: z.
        costs: c, of each decision of a unit.
        budget: B, in the costs' unit, for all U units together.

    Shape:
        logits [U, R], costs [R]. Output: scalar, without a gradient.

    Example:
        >>> import torch
        >>> budget_shift(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.ones(2), 2.0).item()
        1.5
    """
    z = logits.detach().flatten()
    z, order = z.sort(descending=True)
    spent = costs.double().expand(len(logits), -1).flatten()[order].cumsum(0)  # float32 would miscount 10⁵ decisions
    fits = (spent <= torch.as_tensor(budget, device=z.device)).sum()
    edge = torch.full_like(z[:1], 2.0)  # half-way to it is 1 away
    above, below = torch.cat([z[:1] + edge, z]), torch.cat([z, z[-1:] - edge])  # [U · R + 1]
    at = fits.view(1)
    return ((above.index_select(0, at) + below.index_select(0, at)) / 2)[0]


class BudgetShift(nn.Module):
    r"""Takes the cut of a batch, :func:`budget_shift`, off its logits: in training z > 0 holds for as many as r* allows, exactly.

    A budget loss pulls all gates alike and is met on average in the end, if at all; calibration afterwards then sends samples
    down paths that were never trained. Here no update costs more than r*, so what is learnt is which decisions are worth their
    FLOPs: logits compete. The cut carries no gradient, and logits that grow together change nothing, so that probabilities
    σ(z − s) stay where they have a gradient.

    In evaluation the running mean of the cuts is taken off. A finished router folds it into its bias
    (:meth:`xdfast.nn.LayerRouter.fold_budget`) and is a plain router. Every process of a distributed run cuts its own batch.

    Args:
        target_flops: r*, in (0, 1]; :attr:`target_flops` may be set anew at every step.
        costs: FLOPs (in any unit) of each layer [L] or branch [L, S].
        always_on: layers that are never skipped, negative from the end; they are paid for first.
        momentum: weight of the newest cut in the running mean, in (0, 1].

    Attributes:
        target_flops: r* of the next call.
        shift: scalar buffer, the running mean.

    Shape:
        logits [U, L, S] or [B, T, L, S], output the same; float32 for half logits.

    Raises:
        ValueError: a target outside (0, 1] or below what ``always_on`` costs; a momentum outside (0, 1]; bad costs; logits of other
            layers.

    Example:
        >>> import torch
        >>> hold = BudgetShift(0.5, [1.0] * 8, always_on=())
        >>> (hold(torch.randn(16, 8, 1)) > 0).float().mean().item()
        0.5
    """

    shift: Tensor
    costs: Tensor
    seen: Tensor

    def __init__(
        self, target_flops: float, costs: Costs, always_on: Sequence[int] = (0, -1), momentum: float = 0.1
    ) -> None:
        super().__init__()
        table = cost_table(costs)
        self.always_on = check_always_on(always_on, len(table))
        check_reachable(check_target(target_flops), self.always_on, table)
        self.target_flops = float(target_flops)
        self.momentum = check_number("momentum", momentum, minimum=0, strict=True)
        if self.momentum > 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum!r}")
        self.layers, self.branches = table.shape
        self._routed = [layer for layer in range(self.layers) if layer not in self.always_on]
        shares = table / table.sum()
        self._fixed = float(shares[list(self.always_on)].sum())
        # of what is routed; not saved: they describe the model
        self.register_buffer("costs", shares[self._routed].flatten(), persistent=False)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, logits: Tensor) -> Tensor:
        if tuple(logits.shape[-2:]) != (self.layers, self.branches):
            raise ValueError(
                f"the budget is of {self.layers} layers with {self.branches} decisions each, got logits {list(logits.shape)}"
            )
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if not self.training or not self._routed:
            return logits - self.shift.to(logits)
        z = (
            torch.stack([logits.detach()[..., layer, :] for layer in self._routed], -2).flatten(0, -3).flatten(1)
        )  # [U, R]
        found = budget_shift(z, self.costs, (self.target_flops * SLACK - self._fixed) * len(z))
        with torch.no_grad():
            newest = found.to(self.shift)
            self.shift.copy_(torch.where(self.seen, torch.lerp(self.shift, newest, self.momentum), newest))
            self.seen.fill_(True)
        return logits - found

    def extra_repr(self) -> str:
        return f"target_flops={self.target_flops:g}, always_on={list(self.always_on)}"
