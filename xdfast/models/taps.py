"""Outputs inside a network as vectors: what can be compared across architectures."""

from __future__ import annotations

import torch
from torch import Tensor

from xdfast.models.features import FeatureModel

__all__ = ["pool_tap", "tap_widths"]


def pool_tap(output: Tensor, name: str) -> Tensor:
    """``[B, D]`` in float32: the mean over places of a tap's output.

    Args:
        output: maps ``[B, D, H, W]`` (convolutional networks), ``[B, H, W, D]`` (Swin and its kin), tokens ``[B, T, D]``
            (vision transformers, class and register tokens included), or vectors ``[B, D]``.
        name: of the tap, for messages.

    Raises:
        ValueError: another shape, or a module that gives no tensor.
    """
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"tap {name!r} gives {got}; taps must give maps, tokens or vectors: name another module")
    output = output.float()
    if output.ndim == 4:
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.mean((1, 2) if channels_last else (2, 3))
    return output.mean(1) if output.ndim == 3 else output


@torch.no_grad()
def tap_widths(model: FeatureModel) -> dict[str, int]:
    """Tap → D, from a forward pass of one black image; the model is left in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.net.parameters()).device
        taps = model(torch.zeros(1, 3, model.image_size, model.image_size, device=device)).taps
        return {name: pool_tap(output, name).shape[1] for name, output in taps.items()}
    finally:
        model.train(was_training)
