"""Budget: what routed layers may cost on average, as a loss on their gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xdfast.ops._checks import check_choice, check_number
from xdfast.ops._costs import Costs, check_always_on, check_reachable, check_target, cost_table

__all__ = ["BudgetComponents", "BudgetLoss"]


class BudgetComponents(NamedTuple):
    """The loss and its parts, all scalars; only ``loss`` carries a gradient.

    Attributes:
        loss: weight · (budget + balance + decisive terms, each with its factor).
        budget: distance from the target, without weight.
        balance: variance of the mean gates of layers that are not always on, without its factor.
        decisive: mean of 4 p (1 − p) over the same layers, in [0, 1], without its factor; NaN without probabilities.
        fraction: FLOPs of the gates as a fraction of all layers', the quantity held at the target.
    """

    loss: Tensor
    budget: Tensor
    balance: Tensor
    decisive: Tensor
    fraction: Tensor


class BudgetLoss(nn.Module):
    r"""Holds the FLOPs of routed layers at a target: what ActDistill's balance loss, zero with all layers on, does not.

    .. math::
        r = \frac{\sum_{l,s} c_{ls} \, \bar g_{ls}}{\sum_{l,s} c_{ls}}, \quad
        L = w \big[ (r - r^*)^2 + \beta \, \mathrm{Var}_{l,s}(\bar g_{ls}) + \delta \, \mathrm{mean}\, 4 p (1 - p) \big]

    with :math:`\bar g_{ls}` the mean over the units (samples, or tokens) of this process's batch, 1 for layers that are
    always on, whose cost counts. ``norm="hinge"`` takes max(0, r − r*) instead of the square: costs below the budget
    are free, and the pull does not fade near it. r is a fraction of the routed layers' FLOPs; what lies around them
    (a vision tower, an action head) is not in it.

    The β term is the paper's, for parity: it asks that layers be used alike (those not always on). The δ term pushes
    probabilities away from 1/2, where a decision turns over from one frame or one rounding to the next; it needs them as a
    second argument, because gates that are exactly 0 or 1 are always decisive. With ``hard_st`` gates r is what will be
    executed.

    Args:
        target_flops: r*, in (0, 1].
        costs: c, FLOPs (in any unit) of each layer [L] or branch [L, S]; None: all alike.
        always_on: layers that are never skipped, negative from the end. Their gates are not looked at.
        norm: ``"squared"`` or ``"hinge"``.
        weight: w ≥ 0.
        balance: β ≥ 0.
        decisive: δ ≥ 0.
        return_components: return :class:`BudgetComponents` instead of the loss alone.

    Shape:
        gates [U, L, S] or [B, T, L, S], or [U, L] for one branch, floating; probabilities the same or None. Output: scalar,
        float32 (float64 if the gates are).

    Raises:
        ValueError: a target outside (0, 1], or below what the layers that are always on cost; costs of another shape,
            negative, not finite or all zero; a layer of ``always_on`` that is not there; unknown norm; NaN gates
            (on the CPU, where looking does not wait); ``decisive`` without probabilities.
        TypeError: gates or probabilities that are not floating point.

    Reference:
        Balance: "ActDistill", arXiv 2511.18082, router loss.

    Example:
        >>> import torch
        >>> criterion = BudgetLoss(0.5, always_on=(0, -1), return_components=True)
        >>> round(criterion(torch.zeros(8, 12, 1)).fraction.item(), 4)  # the first and the last of 12 layers
        0.1667
    """

    shares: Tensor

    def __init__(
        self,
        target_flops: float,
        costs: Costs | None = None,
        always_on: Sequence[int] | None = None,
        norm: str = "squared",
        weight: float = 1.0,
        *,
        balance: float = 0.0,
        decisive: float = 0.0,
        return_components: bool = False,
    ) -> None:
        super().__init__()
        self.target_flops = check_target(target_flops)
        self.norm = check_choice("norm", norm, ("squared", "hinge"))
        self.weight = check_number("weight", weight, minimum=0)
        self.balance = check_number("balance", balance, minimum=0)
        self.decisive = check_number("decisive", decisive, minimum=0)
        self.always_on, self.return_components = tuple(always_on or ()), return_components
        # [L, S], of sum 1; not saved: it describes the model, as its configuration does
        self.register_buffer("shares", None, persistent=False)
        if costs is not None:
            table = cost_table(costs)
            self._on(table)
            self.shares = (table / table.sum()).float()

    def _on(self, table: Tensor) -> tuple[int, ...]:
        """The layers that are always on; they exist and leave the target in reach. ``table`` is on the CPU."""
        on = check_always_on(self.always_on, len(table))
        check_reachable(self.target_flops, on, table)
        return on

    def forward(self, gates: Tensor, probabilities: Tensor | None = None) -> Tensor | BudgetComponents:
        self._check(gates)
        usage = _mean_over_units(gates)  # [L, S]
        layers, branches = usage.shape
        on = check_always_on(self.always_on, layers)
        if self.shares is None and len(on) / layers > self.target_flops:  # with costs the constructor knew
            self._on(torch.ones(layers, 1))
        routed = torch.ones_like(usage, dtype=torch.bool)
        for layer in on:
            routed[layer] = False
        usage = usage.masked_fill(~routed, 1)
        fraction = usage.mean() if self.shares is None else (usage * self.shares.to(usage)).sum()
        excess = fraction - self.target_flops
        budget = excess.square() if self.norm == "squared" else excess.clamp(min=0)
        count = max((layers - len(on)) * branches, 1)
        mean = (usage * routed).sum() / count
        balance = ((usage - mean).square() * routed).sum() / count
        loss = budget + self.balance * balance if self.balance else budget
        decisive = torch.full_like(budget, float("nan"))
        if self.decisive and probabilities is None:
            raise ValueError(
                "decisive needs the probabilities of the gates: criterion(gates, gate.probabilities(logits))"
            )
        if probabilities is not None and (self.decisive or self.return_components):
            if not isinstance(probabilities, Tensor) or not probabilities.dtype.is_floating_point:
                got = getattr(probabilities, "dtype", type(probabilities).__name__)
                raise TypeError(f"probabilities must be a floating-point tensor like the gates, got {got}")
            if probabilities.device != gates.device:
                raise ValueError(f"probabilities must be on {gates.device} like the gates, got {probabilities.device}")
            if probabilities.shape != gates.shape:
                raise ValueError(
                    f"probabilities must have the shape of the gates, {list(gates.shape)}, got {list(probabilities.shape)}"
                )
            p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))  # before products are rounded
            indecision = _mean_over_units(4 * p * (1 - p))
            decisive = (indecision * routed).sum() / count
            loss = loss + self.decisive * decisive if self.decisive else loss
        loss = loss * self.weight
        if not self.return_components:
            return loss
        return BudgetComponents(loss, *(part.detach() for part in (budget, balance, decisive, fraction)))

    def _check(self, gates: Tensor) -> None:
        if not isinstance(gates, Tensor) or not gates.dtype.is_floating_point:
            raise TypeError(
                f"gates must be a floating-point tensor, got {getattr(gates, 'dtype', type(gates).__name__)}"
            )
        if gates.dim() not in (2, 3, 4) or gates.numel() == 0:
            raise ValueError(
                f"gates must have shape [units, layers, branches], [B, T, layers, branches] or [units, layers], and not be "
                f"empty, got {list(gates.shape)}"
            )
        if gates.device.type == "cpu" and not torch.compiler.is_compiling() and bool(gates.isnan().any()):
            raise ValueError(f"{int(gates.isnan().sum())} of {gates.numel()} gates are NaN; look at the router's input")
        table = (gates.shape[1], 1) if gates.dim() == 2 else tuple(gates.shape[-2:])
        if self.shares is not None and table != tuple(self.shares.shape):
            raise ValueError(f"costs are of {list(self.shares.shape)} [layers, branches], but gates of {list(table)}")

    def extra_repr(self) -> str:
        return (
            f"target_flops={self.target_flops:g}, norm={self.norm!r}, weight={self.weight:g}, balance={self.balance:g}, "
            f"decisive={self.decisive:g}, always_on={list(self.always_on)}"
        )


def _mean_over_units(gates: Tensor) -> Tensor:
    """[U, L], [U, L, S] or [B, T, L, S] → [L, S], float32 for half inputs."""
    gates = gates[..., None] if gates.dim() == 2 else gates
    return gates.flatten(0, -3).mean(0, dtype=torch.promote_types(gates.dtype, torch.float32))
