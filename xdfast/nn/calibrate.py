"""Thresholds for a budget: after training, how sure must a router be before a layer runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xdfast.ops._checks import check_choice
from xdfast.ops._costs import SLACK, Costs, check_always_on, check_reachable, check_target, cost_table

__all__ = ["Calibration", "calibrate_flops", "select_per_sample"]

SCOPES = ("global", "branch", "sample")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`calibrate_flops` chose, and what it costs on the calibration set.

    Attributes:
        threshold: a branch runs where p > threshold: one number, or [L, S] with ``scope="branch"``; None with
            ``scope="sample"``, where no threshold exists. An argument of :meth:`GateFunction.set`.
        target_flops: what was asked for.
        expected_flops: mean over samples of the FLOPs of what runs, as a fraction of all routed layers'; at most the target.
        worst_flops: the same of the most expensive sample.
        usage: [L, S] float64, fraction of samples that run each branch.
        scope: ``"global"``, ``"branch"`` or ``"sample"``.
        always_on: layers that run whatever p is.
        costs: [L, S] float64, as given.
    """

    threshold: float | Tensor | None
    target_flops: float
    expected_flops: float
    worst_flops: float
    usage: Tensor
    scope: str = "global"
    always_on: tuple[int, ...] = ()
    costs: Tensor = field(default_factory=lambda: torch.ones(1, 1), repr=False)

    def select(self, probabilities: Tensor) -> Tensor:
        """Which branches of which samples run, [N, L, S] → bool [N, L, S]: the rule applied to any probabilities."""
        probabilities = _at_least_float32(probabilities)
        if self.threshold is None:
            return select_per_sample(probabilities, self.costs, self.target_flops, self.always_on)
        threshold = self.threshold
        active = probabilities > (threshold.to(probabilities) if isinstance(threshold, Tensor) else threshold)
        active[:, list(self.always_on)] = True
        return active


def calibrate_flops(
    probabilities: Tensor,
    costs: Costs,
    target_flops: float,
    always_on: Sequence[int] = (),
    *,
    scope: str = "global",
) -> Calibration:
    r"""The lowest threshold that keeps a FLOP budget on calibration data; exact, by sorting.

    .. math::
        \theta^* = \min \Big\{ \theta : \frac{1}{N} \sum_{n,l,s} c_{ls} 1[p_{nls} > \theta] \le r^* \sum_{l,s} c_{ls} \Big\}

    with layers that are always on counted as running. Pairs (sample, branch) with equal p run together or not at all, as
    a threshold must have it; p = 0 never runs. θ lies half-way between the last p that runs and the first that does not,
    so that rounding on another device turns no decision of the calibration set over.

    Scopes of the budget:

    * ``"global"``: the mean over samples, one θ; a hard sample may cost more than an easy one.
    * ``"branch"``: each branch runs for the same fraction of samples, θ [L, S]: where probabilities of different layers
      are not comparable.
    * ``"sample"``: every sample alone, :func:`select_per_sample`: a bound on the worst case instead of the mean.

    Args:
        probabilities: of :meth:`xdfast.nn.GateFunction.probabilities` on calibration data, without noise.
        costs: FLOPs (in any unit) of each branch.
        target_flops: r*, in (0, 1].
        always_on: layers that are never skipped, negative from the end.
        scope: see above.

    Shape:
        probabilities [N, L, S], N ≥ 1, or [N, L]; costs [L, S] or [L].

    Raises:
        ValueError: a target outside (0, 1] or below what the layers that are always on cost; probabilities that are NaN,
            outside [0, 1] or of another shape; costs that are of another shape, negative, not finite or all zero; unknown
            scope.
        TypeError: probabilities that are not floating point.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.7, 0.1]])
        >>> found = calibrate_flops(p, [1.0, 1.0], 0.5)
        >>> round(found.threshold, 2), found.expected_flops  # 3 of 6 run: 0.9, 0.8, 0.7
        (0.65, 0.5)
    """
    target = check_target(target_flops)
    return calibrate_checked(*checked(probabilities, costs, always_on), target, check_choice("scope", scope, SCOPES))


def calibrate_checked(p: Tensor, costs: Tensor, always_on: tuple[int, ...], target: float, scope: str) -> Calibration:
    """The function on checked values; ``target`` may also be exactly what the layers that are always on cost, or 0."""
    fixed = check_reachable(target, always_on, costs)
    routed = torch.ones(costs.shape, dtype=torch.bool)
    routed[list(always_on)] = False
    threshold: float | Tensor | None = None
    if scope == "global":
        budget = (target * float(costs.sum()) - float(costs[~routed].sum())) * len(p)
        threshold = _lowest(p[:, routed].flatten(), costs[routed].repeat(len(p)), budget, len(p) * float(costs.sum()))
    elif scope == "branch":
        share = (target - fixed) / (1 - fixed) if fixed < 1 else 1.0  # of the samples
        threshold = torch.zeros(costs.shape, dtype=torch.float64)
        for layer, branch in routed.nonzero().tolist():
            column = p[:, layer, branch]
            threshold[layer, branch] = _lowest(column, torch.ones(len(p)), share * len(p), len(p))
    base = Calibration(threshold, target, 0.0, 0.0, torch.empty(0), scope, always_on, costs)
    active = base.select(p)
    spent = (active * costs).sum((1, 2)) / costs.sum()
    mean, worst, usage = float(spent.mean()), float(spent.max()), active.double().mean(0)
    return Calibration(threshold, target, mean, worst, usage, scope, always_on, costs)


def _lowest(p: Tensor, costs: Tensor, budget: float, whole: float) -> float:
    """Lowest threshold at which the costs of what is above it are within the budget; ``whole`` sets the scale of slack."""
    p, order = p.sort(descending=True)
    spent = costs[order].double().cumsum(0)
    # p[i] and its equals run together: only the last of equals can be the end
    last = torch.ones(len(p), dtype=torch.bool)
    last[:-1] = p[:-1] != p[1:]
    fits = (last & (spent <= budget + (SLACK - 1) * whole) & (p > 0)).nonzero().flatten()
    if len(fits) == 0:
        return 1.0
    end = int(fits[-1])
    return _between(float(p[end + 1]) if end + 1 < len(p) else 0.0, float(p[end]))


def _between(low: float, high: float) -> float:
    """A number t with low ≤ t < high, half-way where there is room: a float32, as a gate's threshold is, if low is one."""
    middle = (low + high) / 2
    rounded = float(torch.tensor(middle, dtype=torch.float32))
    if low <= rounded < high:
        return rounded
    # neighbours, and half-way is rounded up
    return low if float(torch.tensor(low, dtype=torch.float32)) == low or middle >= high else middle


def select_per_sample(
    probabilities: Tensor, costs: Costs, target_flops: float, always_on: Sequence[int] = ()
) -> Tensor:
    r"""What each sample runs if each alone must keep the budget: the most probable per FLOP first.

    A knapsack per sample, by the greedy rule: branches in the order of p / c, the first the largest, each taken if it
    still fits beside those taken before and p > 0. With equal costs this is the top-k of p and optimal; with unequal
    costs it misses the optimum of Σ p by less than the value of one branch. Computed for all samples together in as many
    passes as there are different costs, without a wait for the device (given costs on the CPU).

    Args:
        probabilities: p, [N, L, S].
        costs: [L, S] or [L], see :func:`calibrate_flops`.
        target_flops: r*, the fraction of the FLOPs of the routed layers that each sample may spend.
        always_on: layers that run, and are paid for, first; they run even where they alone are above the budget.

    Shape:
        probabilities [N, L, S]. Output: bool [N, L, S].

    Raises:
        ValueError: costs that are of another shape, negative, not finite or all zero.

    Example:
        >>> import torch
        >>> select_per_sample(torch.tensor([[[0.9], [0.3], [0.6]]]), [1.0, 1.0, 1.0], 2 / 3).flatten().tolist()
        [True, False, True]
    """
    if probabilities.dim() != 3:
        raise ValueError(f"probabilities must have shape [samples, layers, branches], got {list(probabilities.shape)}")
    table = cost_table(costs, (probabilities.shape[1], probabilities.shape[2]))
    routed = torch.ones(table.shape, dtype=torch.bool)
    routed[list(check_always_on(always_on, len(table)))] = False
    budget = float(table.sum()) * target_flops * SLACK - float(table[~routed].sum())
    passes = len(set(table[routed].tolist()))
    p = probabilities.double().flatten(1)  # [N, L·S]
    # non_blocking: a plain copy to a GPU waits for it
    price, may = (x.flatten().to(p.device, non_blocking=True).expand_as(p) for x in (table, routed))
    wanted = may & (p > 0)
    order = torch.where(wanted, p / price, 0).sort(dim=1, descending=True, stable=True).indices
    wanted, price = wanted.gather(1, order), price.gather(1, order)
    taken, left = torch.zeros_like(wanted), torch.full_like(p[:, :1], budget)
    for _ in range(passes):
        # Up to the first that does not fit. Nothing at its price or above fits any more: one price less in the next pass.
        open_ = wanted & ~taken & (price <= left)
        stop = (price * open_).cumsum(1) > left
        new = open_ & (stop.cumsum(1) == 0)
        taken, left = taken | new, left - (price * new).sum(1, keepdim=True)
    active = torch.zeros_like(taken).scatter(1, order, taken).unflatten(1, table.shape)
    return active | ~may.unflatten(1, table.shape)


def checked(probabilities: Tensor, costs: Costs, always_on: Sequence[int]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Probabilities [N, L, S] and costs [L, S] float64 on the CPU, layers sorted from 0."""
    if not isinstance(probabilities, Tensor) or not probabilities.dtype.is_floating_point:
        kind = getattr(probabilities, "dtype", type(probabilities).__name__)
        raise TypeError(f"probabilities must be a floating-point tensor, got {kind}")
    p = _at_least_float32(probabilities.detach().cpu())
    p = p[..., None] if p.dim() == 2 else p
    if p.dim() != 3 or p.numel() == 0:
        raise ValueError(
            f"probabilities must have shape [samples, layers, branches] and not be empty, got {list(probabilities.shape)}; "
            "flatten(0, 1) decisions of tokens"
        )
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(
            f"probabilities must be in [0, 1], got {float(p.min()):g} to {float(p.max()):g}; pass gate.probabilities(logits)"
        )
    shape = (p.shape[1], p.shape[2])
    return p, cost_table(costs, shape), check_always_on(always_on, p.shape[1])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
