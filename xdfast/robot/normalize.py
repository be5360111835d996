"""Min-max normalisation of actions and states to [-1, 1], kept in the checkpoint as buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MinMax"]

#: A dimension that moves less than this is constant: stretching it to [-1, 1] would blow up noise.
_CONSTANT = 1e-4


class MinMax(nn.Module):
    """``y = x · scale + offset`` with y in [-1, 1] over the values it was fitted to; constant dimensions become 0.

    Buffers, not parameters: saved, moved between devices, never trained.

    Args:
        dim: numbers in the last axis.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("offset", torch.zeros(dim))

    @torch.no_grad()
    def fit(self, low: Tensor, high: Tensor) -> MinMax:
        """Takes the range ``low``..``high``, each ``[dim]``.

        Raises:
            ValueError: values that are not finite, or ``high`` below ``low``.
        """
        for name, value in (("smallest", low), ("largest", high)):
            if not value.isfinite().all():
                bad = (~value.isfinite()).nonzero().flatten().tolist()
                raise ValueError(f"the {name} values of dimensions {bad} are not finite: {value.tolist()}")
        if (high < low).any():
            raise ValueError(f"the largest values lie below the smallest: {high.tolist()} < {low.tolist()}")
        low, high = low.double(), high.double()
        constant = high - low < _CONSTANT
        scale = torch.where(constant, torch.ones_like(low), 2 / (high - low).clamp(min=_CONSTANT))
        offset = torch.where(constant, -(low + high) / 2, -1 - low * scale)
        self.scale.copy_(scale)
        self.offset.copy_(offset)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """To [-1, 1]."""
        return x * self.scale + self.offset

    def inverse(self, y: Tensor) -> Tensor:
        """Back to the units of the data."""
        return (y - self.offset) / self.scale
