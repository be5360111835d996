"""ActDistill's routed forward as published, for reproduction only: two different functions in training and inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["actdistill_inference", "actdistill_training"]


def actdistill_training(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, gates: Tensor) -> Tensor:
    r"""The published training forward: :math:`h_{l+1} = g_l \cdot F_l(h_l)`, the whole hidden state times the gate.

    **Do not train with it.** A layer's output holds the residual stream, so a small gate erases what came before it,
    while inference (:func:`actdistill_inference`) skips the layer and keeps it. On 32 random pre-RMSNorm layers the
    outputs of the two, after the final norm, have a cosine of 0.015 with gates of 0.05 and 0.95, and 0.026 with 0.001 and
    0.999: sharper gates do not help. ``x + g * f(norm(x))``, which xdfast uses everywhere else, has 0.998 and 1.0000, and
    is exact at gates of 0 and 1. Besides, a final RMSNorm does not see the scale of its input: the gate of the last
    layer gets no gradient here.

    Args:
        layers: F, whole layers with their residual connections, [B, T, D] → [B, T, D].
        x: hidden states before layer 0.
        gates: one per sample and layer.

    Shape:
        x [B, T, D], gates [B, L]. Output: [B, T, D].

    Raises:
        ValueError: shapes do not fit.

    Reference:
        "ActDistill", arXiv 2511.18082, and its public code.

    Example:
        >>> import torch
        >>> actdistill_training([lambda h: h + 1], torch.ones(1, 1, 2), torch.tensor([[0.5]])).tolist()
        [[[1.0, 1.0]]]
    """
    _check(layers, x, gates)
    for number, layer in enumerate(layers):
        x = layer(x) * gates[:, number, None, None]
    return x


def actdistill_inference(
    layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, gates: Tensor, threshold: float = 0.5
) -> Tensor:
    r"""The published inference forward: :math:`h_{l+1} = F_l(h_l)` where g > ``threshold``, else :math:`h_l`.

    The gate's value is dropped. Unlike the public code this changes no tensor in place (there, hidden states that had
    been stored, and the caller's embeddings, change with it), and all layers run: it shows the function, not its speed.
    Equal to ``x + g * f(norm(x))`` at gates of 0 and 1. Arguments, Shape, Raises and Reference as of
    :func:`actdistill_training`.

    Example:
        >>> import torch
        >>> actdistill_inference([lambda h: h + 1] * 2, torch.ones(1, 1, 2), torch.tensor([[0.4, 0.9]])).tolist()
        [[[2.0, 2.0]]]
    """
    _check(layers, x, gates)
    for number, layer in enumerate(layers):
        x = torch.where(gates[:, number, None, None] > threshold, layer(x), x)
    return x


def _check(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, gates: Tensor) -> None:
    if x.dim() != 3 or gates.shape != (x.shape[0], len(layers)):
        raise ValueError(
            f"x must have shape [B, T, D] and gates [B, L] with L={len(layers)} layers, got {list(x.shape)} and {list(gates.shape)}"
        )
