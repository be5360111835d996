"""The plan of routed layers by its definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["route_plan_reference"]


def route_plan_reference(
    gates: Tensor, force: Tensor | None, threshold: float, hard: bool, rows_per_unit: int, samples: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(gate, index, count, offsets, invalid) of gates [U, L, S]; entries of ``index`` from ``count`` on are U."""
    units = gates.shape[0]
    values = gates.detach().float().permute(1, 2, 0)  # [L, S, U]
    on = values > threshold
    listed = on if force is None else on | force.permute(1, 2, 0)
    gate = on.float() if hard else torch.where(listed, values, 0.0)
    numbers = torch.arange(units, device=gates.device)
    index = torch.where(listed, numbers, units).sort(-1).values.int()
    per_sample = listed.unflatten(-1, (samples, units // samples)).sum(-1).cumsum(-1) * rows_per_unit
    offsets = torch.nn.functional.pad(per_sample, (1, 0)).int()
    invalid = (~((values >= 0) & (values <= 1))).sum(-1).int()
    return gate.contiguous(), index.contiguous(), listed.sum(-1).int(), offsets.contiguous(), invalid
