"""Routers that do not learn, to compare a learned one with: a fixed choice of layers, and chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from xdfast.nn.router import LayerRouter
from xdfast.ops._costs import check_always_on, check_target

__all__ = ["RandomRouter", "StaticRouter", "block_influence", "most_influential"]

#: Logit of a layer that is on, minus that of one that is off: sigmoid gives 1 and 0 to 6 digits at any temperature ≤ 1.
_SURE = 16.0

_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # of splitmix64, as signed numbers


class StaticRouter(LayerRouter):
    """The same layers for every sample: static depth pruning, in the same stack as a learned router, counted the same way.

    Args:
        dim: D.
        num_layers: L.
        keep: layers that run; negative ones count from the end. Empty: all, until saved weights say which.

    Shape:
        tokens [B, T, D] → logits [B, L, 1].

    Raises:
        ValueError: a layer that is not there.

    Example:
        >>> import torch, xdfast.nn
        >>> router = xdfast.nn.StaticRouter(32, num_layers=4, keep=(0, 3))
        >>> (router(torch.randn(2, 5, 32)) > 0).int()[:, :, 0].tolist()
        [[1, 0, 0, 1], [1, 0, 0, 1]]
    """

    logits: Tensor

    def __init__(self, dim: int, num_layers: int, keep: Sequence[int] = ()) -> None:
        super().__init__(dim, num_layers, hidden=1)
        self.projections, self.head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]  # nothing to learn
        logits = torch.full((num_layers, 1), -_SURE if keep else _SURE)
        logits[list(check_always_on(keep, num_layers))] = _SURE
        self.register_buffer("logits", logits)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(tokens, mask)
        return self.logits.expand(len(tokens), -1, -1)

    def flops(self, tokens: int) -> int:
        """None."""
        return 0


class RandomRouter(LayerRouter):
    r"""A random choice of layers for every input, so many that the budget is met: what a router has to beat.

    Of the layers that are not always on, n or n + 1 run, drawn without replacement, so that on average
    :math:`r^* L` layers do. The draw is a hash of the input's numbers: the same input takes the same path, and any
    change of it another one. Layers are taken as equally expensive.

    Args:
        dim: D.
        num_layers: L.
        target: r*, fraction of the layers.
        always_on: layers that run anyway.
        seed: of the hash.

    Shape:
        tokens [B, T, D] → logits [B, L, 1].

    Raises:
        ValueError: a target outside (0, 1], or below the share of the layers that are always on.

    Example:
        >>> import torch, xdfast.nn
        >>> router = xdfast.nn.RandomRouter(32, num_layers=8, target=0.5, always_on=(0, -1))
        >>> (router(torch.randn(3, 5, 32)) > 0).sum((1, 2)).tolist()  # of the 8, with the two that are always on
        [4, 4, 4]
    """

    def __init__(
        self, dim: int, num_layers: int, target: float = 0.5, always_on: Sequence[int] = (0, -1), seed: int = 0
    ) -> None:
        super().__init__(dim, num_layers, hidden=1)
        self.projections, self.head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]  # nothing to learn
        self.target, self.always_on, self.seed = check_target(target), check_always_on(always_on, num_layers), seed
        self.free = target * num_layers - len(self.always_on)
        if self.free < -1e-9:
            raise ValueError(
                f"target={target:g} of {num_layers} layers is less than the {len(self.always_on)} that are always on"
            )

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(tokens, mask)
        numbers = tokens.detach().float().flatten(1).view(torch.int32).long()  # their bits
        key = numbers.sum(1, keepdim=True) + self.seed  # [B, 1]
        draws = _uniform(key, torch.arange(1, self.num_layers + 2, device=tokens.device))  # [B, L + 1]
        scores, coin = draws[:, :-1], draws[:, -1:]
        scores[:, list(self.always_on)] = -1
        whole = math.floor(self.free + 1e-9)
        count = whole + (coin < self.free - whole).long()  # [B, 1]
        rank = scores.argsort(1, descending=True).argsort(1)  # [B, L]
        on = rank < count
        on[:, list(self.always_on)] = True
        return torch.where(on, _SURE, -_SURE).to(tokens.dtype)[..., None]

    def flops(self, tokens: int) -> int:
        """None that count."""
        return 0


def block_influence(states: Sequence[Tensor]) -> Tensor:
    r"""How much each layer changes the tokens, :math:`\mathrm{BI}_l = 1 - \mathrm{mean} \cos(h_l, h_{l+1})`.

    Args:
        states: h₀ … h_L, each [B, T, D], as of :func:`xdfast.robot.vla.hidden_states`.

    Returns:
        [L], float64.

    Raises:
        ValueError: fewer than two states.

    Reference:
        Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853, eq. 1.
    """
    if len(states) < 2:
        raise ValueError(f"the influence of layers needs the states before and after them, got {len(states)} states")
    pairs = pairwise(states)
    return torch.stack([1 - torch.cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in pairs])


def most_influential(influence: Tensor, target: float, always_on: Sequence[int] = (0, -1)) -> tuple[int, ...]:
    """The layers to keep for a budget: those that are always on, then the most influential ones; at most ``target`` · L.

    Raises:
        ValueError: a target outside (0, 1], or below the share of the layers that are always on.
    """
    count = len(influence)
    on = check_always_on(always_on, count)
    room = math.floor(check_target(target) * count + 1e-9)
    if room < len(on):
        raise ValueError(f"target={target:g} of {count} layers is less than the {len(on)} that are always on")
    order = [layer for layer in influence.argsort(descending=True).tolist() if layer not in on]
    return tuple(sorted((*on, *order[: room - len(on)])))


def _uniform(key: Tensor, salt: Tensor) -> Tensor:
    """splitmix64 of int64 keys [B, 1] with salts [N] → [B, N] float32 in [0, 1)."""
    x = key * 0x632BE59BD9B4E019 + salt * -0x61C8864680B583EB
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & 0xFFFFFF).float() / (1 << 24)
