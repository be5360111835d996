"""The denoiser of a diffusion policy as it runs on a CPU: the same layers, each one call of a fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.packed import Folded
from xdfast.ops.conv_rows import PackedRows, conv_rows, conv_rows_available, pack_rows, pack_rows_transposed
from xdfast.robot.diffusion import Diffusion
from xdfast.robot.unet1d import ConditionalUnet1d, ConvNormMish, ResidualBlock1d

__all__ = ["PackedUnet", "packed_sampling"]


@dataclass(frozen=True)
class _Block:
    """A residual block; ``film`` is where its part of the FiLM vector begins."""

    first: PackedRows
    second: PackedRows
    skip: PackedRows | None
    film: int

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        h = conv_rows(x, self.first, film=film, film_offset=self.film)
        return conv_rows(h, self.second, residual=x if self.skip is None else conv_rows(x, self.skip))


@dataclass(frozen=True)
class _Layers:
    down: list[tuple[_Block, _Block]]
    shrink: list[PackedRows]
    middle: list[_Block]
    up: list[tuple[_Block, _Block]]
    grow: list[PackedRows]
    last: tuple[PackedRows, PackedRows]


class PackedUnet:
    """Denoises like the :class:`ConditionalUnet1d` it was made from, to rounding; takes its place in
    :meth:`xdfast.robot.diffusion.Diffusion.sample`.

    Its weights are copies in the kernel's layout (as much memory again), made at the first decision, and anew at one before which
    the network's own have changed.

    Args:
        unet: float32 on the CPU.

    Shape:
        as the network's parts; without a gradient.
    """

    def __init__(self, unet: ConditionalUnet1d) -> None:
        self.unet = unet
        self._current = Folded(self._pack, lambda: list(unet.parameters()))

    def condition_part(self, condition: Tensor) -> Tensor:
        """Once a decision: the network's, and a look whether its weights have changed."""
        self._layers: _Layers = self._current()
        return self.unet.condition_part(condition)

    def time_part(self, steps: Tensor) -> Tensor:
        """The network's."""
        return self.unet.time_part(steps)

    def denoise(self, actions: Tensor, film: Tensor) -> Tensor:
        """:meth:`ConditionalUnet1d.denoise` with the weights of the last :meth:`condition_part`."""
        layers = self._layers
        x, film = actions.float().contiguous(), film.float().contiguous()  # also under autocast
        kept = []
        for level, (first, second) in enumerate(layers.down):
            x = second(first(x, film), film)
            kept.append(x)
            if level < len(layers.shrink):
                x = conv_rows(x, layers.shrink[level])
        for block in layers.middle:
            x = block(x, film)
        for (first, second), grow in zip(layers.up, layers.grow):
            x = second(first(torch.cat([x, kept.pop()], dim=2), film), film)
            x = conv_rows(x, grow).view(len(x), 2 * x.shape[1], grow.outputs // 2)
        return conv_rows(conv_rows(x, layers.last[0]), layers.last[1])

    def _pack(self) -> _Layers:
        unet: Any = self.unet  # a type checker sees only Module in a ModuleList
        offset = 0

        def block(module: ResidualBlock1d) -> _Block:
            nonlocal offset
            begin, offset = offset, offset + 2 * module.outputs
            skip = None if isinstance(module.skip, nn.Identity) else _rows(module.skip)
            return _Block(_normed(module.first), _normed(module.second), skip, begin)

        down = [(block(first), block(second)) for first, second in unet.down]
        middle = [block(module) for module in unet.middle]
        up = [(block(first), block(second)) for first, second in unet.up]
        grow = [pack_rows_transposed(g.weight[:, :, 0], g.bias) for g in unet.grow]
        last = _normed(unet.last[0]), _rows(unet.last[1])
        return _Layers(down, [_rows(s) for s in unet.shrink], middle, up, grow, last)


def _rows(conv: Any) -> PackedRows:
    """Of a convolution of height 1."""
    return pack_rows(conv.weight[:, :, 0], conv.bias, stride=conv.stride[1], padding=conv.padding[1])


def _normed(layer: ConvNormMish) -> PackedRows:
    conv: Any = layer[0]
    norm: Any = layer[1]
    facts = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    return pack_rows(conv.weight[:, :, 0], conv.bias, padding=conv.padding[1], norm=facts)


def packed_sampling(policy: Any, device: torch.device) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str]:
    """``policy.diffusion.sample`` by a :class:`PackedUnet`, or None where that cannot be, and why (empty: it is not asked for).

    Args:
        policy: any policy; only a diffusion policy with a float32 :class:`ConditionalUnet1d` has one.
        device: where it runs.
    """
    diffusion = getattr(policy, "diffusion", None)
    if (
        device.type != "cpu"
        or not isinstance(diffusion, Diffusion)
        or not isinstance(diffusion.unet, ConditionalUnet1d)
    ):
        return None, ""
    plain = type(diffusion) is Diffusion and type(diffusion.unet) is ConditionalUnet1d
    if not plain or policy.core != diffusion.sample:
        return None, "denoiser by its modules: the fused layers know ConditionalUnet1d, not what is derived from it"
    if any(p.dtype != torch.float32 for p in diffusion.unet.parameters()):
        return None, "denoiser by its modules: the fused layers are float32"
    found, why = conv_rows_available()
    if not found:
        return None, f"denoiser by its modules: {why}"
    return partial(diffusion.sample, denoiser=PackedUnet(diffusion.unet)), "denoiser in fused layers (xdfast._C)"
