"""Costs of routed layers, checked once for the losses that hold a budget and the thresholds that keep it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xdfast.ops._checks import check_number

__all__ = ["Costs", "check_always_on", "check_reachable", "check_target", "cost_table"]

#: FLOPs, in any unit, per layer [L] or per layer and branch [L, S].
Costs = Tensor | Sequence[float] | Sequence[Sequence[float]]

#: Decimal targets are not binary: 0.58 · 50 is below 29. Sums up to this factor above a budget are within it.
SLACK = 1 + 1e-9


def check_target(target_flops: float) -> float:
    """A fraction of the FLOPs of all routed layers, in (0, 1].

    Raises:
        TypeError: not a real number.
        ValueError: out of range.
    """
    target = check_number("target_flops", target_flops, minimum=0, strict=True)
    if target > 1:
        raise ValueError(f"target_flops is a fraction of all routed layers, in (0, 1], got {target_flops!r}")
    return target


def cost_table(costs: Costs, shape: tuple[int, int] | None = None) -> Tensor:
    """Costs as a float64 table [L, S] on the CPU (FLOPs of a layer can have more digits than float32).

    Raises:
        ValueError: another shape, negative, not finite or all zero.
    """
    table = torch.as_tensor(costs, dtype=torch.float64).detach().cpu()
    table = table[:, None] if table.dim() == 1 else table
    if table.dim() != 2 or table.numel() == 0 or (shape is not None and tuple(table.shape) != shape):
        wanted = "" if shape is None else f" = {list(shape)}"
        raise ValueError(f"costs must have shape [layers, branches]{wanted} or [layers], got {list(table.shape)}")
    if not bool((table.isfinite() & (table >= 0)).all()) or not bool(table.sum() > 0):
        raise ValueError(f"costs must be finite, ≥ 0 and not all zero, got {table.tolist()}")
    return table


def check_always_on(always_on: Sequence[int], layers: int) -> tuple[int, ...]:
    """Layers that are never skipped, negative from the end → sorted, from 0, each once.

    Raises:
        ValueError: a layer that is not there.
    """
    if not all(-layers <= layer < layers for layer in always_on):
        raise ValueError(f"always_on names layers of 0 to {layers - 1}, or negative, got {list(always_on)}")
    return tuple(sorted({layer % layers for layer in always_on}))


def check_reachable(target: float, on: Sequence[int], table: Tensor) -> float:
    """The fraction of the FLOPs that layers ``on`` take alone, which must leave ``target`` in reach.

    Raises:
        ValueError: they cost more.
    """
    fixed = float(table[list(on)].sum() / table.sum())
    if fixed > target * SLACK:
        raise ValueError(
            f"target_flops={target:g} cannot be reached: the layers that are always on, {list(on)}, alone are "
            f"{fixed:.4g} of the FLOPs; raise the target or leave fewer always on"
        )
    return fixed
