"""The plain formulation of :func:`xdfast.ops.conv_rows.conv_rows`, in any floating dtype."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["conv_rows_reference"]


def conv_rows_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``a(x) (1 + scale) + shift + residual`` with ``a = mish(GroupNorm(conv(x)))``, or ``a = conv(x)`` if ``groups`` is 0.

    Shape:
        x [B, H, I], weight [O, I, K], bias, norm_weight, norm_bias [O], scale, shift [B, O], residual and output [B, H', O].
    """
    y = F.conv1d(x.transpose(1, 2), weight, bias, stride=stride, padding=padding)
    if groups:
        y = F.mish(F.group_norm(y, groups, norm_weight, norm_bias, eps))
    y = y.transpose(1, 2)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, None]) + shift[:, None]
    return y if residual is None else y + residual
