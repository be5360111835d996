"""Sums and products in float32 at least, whatever the inputs and autocast are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["wide", "without_autocast"]


def wide(*tensors: Tensor) -> list[Tensor]:
    """All in float64 if one is, else in float32."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which products have the precision of their inputs."""
    if device.type == "meta":  # has no autocast; torch.amp.is_autocast_available cannot be traced by torch 2.9
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)
