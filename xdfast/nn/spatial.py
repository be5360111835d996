"""Outputs inside a network as maps, whatever its architecture: [B, D, H, W]."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HintRegressor", "map_side", "to_grid", "to_map"]


def to_map(output: Tensor, prefix_tokens: int = 0) -> Tensor:
    """``[B, D, H, W]`` of a module's output.

    Args:
        output: maps ``[B, D, H, W]`` (convolutional networks) or ``[B, H, W, D]`` (Swin and its kin: square, H = W ≠ D),
            tokens ``[B, T, D]`` of a square image (vision transformers, mixers), or vectors ``[B, D]`` (one place).
        prefix_tokens: class and register tokens at the start of T, which have no place.

    Raises:
        ValueError: another shape, or tokens that are no square.
    """
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected maps [B, D, H, W] or [B, H, W, D], tokens [B, T, D] or vectors [B, D], got {got}")
    if output.ndim == 4:
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.ndim == 2:
        return output[:, :, None, None]
    places = output.shape[1] - prefix_tokens
    side = math.isqrt(max(places, 0))
    if side < 1 or side * side != places:
        raise ValueError(
            f"{output.shape[1]} tokens, {prefix_tokens} of them without a place, are no square image; tap a module that "
            "keeps all patches"
        )
    return output[:, prefix_tokens:].transpose(1, 2).unflatten(2, (side, side))


def map_side(output: Tensor, prefix_tokens: int = 0) -> int:
    """Places per side of :func:`to_map`, the shorter side."""
    return min(to_map(output, prefix_tokens).shape[2:])


def to_grid(output: Tensor, grid: int, prefix_tokens: int = 0) -> Tensor:
    """``[B, D, grid, grid]``: :func:`to_map`, averaged to ``grid`` places per side."""
    return F.adaptive_avg_pool2d(to_map(output, prefix_tokens), grid)


class HintRegressor(nn.Module):
    r"""FitNet's regressor r(·): a student's map at the teacher's width and grid; used in training only.

    A 1×1 convolution without bias over the map averaged to ``grid`` × ``grid`` places. The paper takes a convolution whose
    kernel brings the student's grid to the teacher's; averaging does that for any two grids, and weights stay d_s · d_t.

    Args:
        in_features: student's channels d_s.
        out_features: teacher's channels d_t.
        grid: places per side.
        prefix_tokens: see :func:`xdfast.nn.spatial.to_map`.

    Shape:
        input as of :func:`xdfast.nn.spatial.to_map`, output [N, d_t, grid, grid].

    Raises:
        ValueError: a size < 1; in use an input of another width or no map.

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, section 2.2.

    Example:
        >>> import torch, xdfast
        >>> xdfast.nn.HintRegressor(64, 192, grid=7)(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 192, 7, 7])
    """

    def __init__(self, in_features: int, out_features: int, grid: int, prefix_tokens: int = 0) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("grid", grid)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.in_features, self.out_features = in_features, out_features
        self.grid, self.prefix_tokens = grid, prefix_tokens
        self.regress = nn.Conv2d(in_features, out_features, 1, bias=False)
        nn.init.kaiming_normal_(self.regress.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, tap: Tensor) -> Tensor:
        placed = to_grid(tap, self.grid, self.prefix_tokens)
        if placed.shape[1] != self.in_features:
            raise ValueError(f"HintRegressor expects {self.in_features} channels, got {list(tap.shape)}")
        return self.regress(placed)
