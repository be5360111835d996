"""The denoiser of a diffusion policy: a one-dimensional U-Net over the action horizon, conditioned by FiLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConditionalUnet1d"]


class ConditionalUnet1d(nn.Module):
    """Noisy actions, diffusion step and condition → what the scheduler asks for (the noise, or the clean actions).

    Every residual block is ``conv(FiLM(conv(x))) + skip(x)`` with ``FiLM(h) = (1 + a) · h + b`` and
    ``[a, b] = W_t mish(e(t)) + W_c mish(c) + w``, ``e`` a sinusoidal embedding followed by two layers. It is the network of
    Diffusion Policy (Chi et al., RSS 2023, arXiv 2303.04137, §IV-A) with one difference in arrangement: ``W`` acts on the
    diffusion step and on the condition separately, for all blocks at once. So a decision computes the part of the condition
    once, not once per denoising step, training computes it once for several draws of noise, and the part of the diffusion
    step is a table. (The 1 in ``1 + a`` lets a fresh network pass its input on.)

    The convolutions are along the horizon alone, written as two-dimensional ones of height 1: PyTorch has channels-last
    kernels for those only, and ``[B, H, A]`` is channels-last already. Weights should be in that format, too
    (``.to(memory_format=torch.channels_last)``).

    Args:
        action_dim: A.
        condition_dim: C.
        widths: channels per level; every level but the last halves the horizon.
        kernel_size: of the convolutions, odd.
        groups: of the GroupNorms; every width is a multiple of it.
        time_dim: size of the embedding of the diffusion step, even.

    Raises:
        ValueError: widths that are no multiple of ``groups``, an even kernel.

    Shape:
        ``actions`` ``[B, H, A]`` with H a multiple of :attr:`stride`, ``steps`` int64 ``[B]``, ``condition`` ``[B, C]`` →
        ``[B, H, A]``.
    """

    # lists of blocks; Any, for a type checker sees only Module in a ModuleList
    down: Any
    up: Any

    def __init__(
        self,
        action_dim: int,
        condition_dim: int,
        *,
        widths: Sequence[int] = (64, 128),
        kernel_size: int = 5,
        groups: int = 8,
        time_dim: int = 64,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ValueError(f"unet_widths must be multiples of {groups} (the groups of its norms), got {widths}")
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if time_dim % 2:
            raise ValueError(f"time_dim must be even, got {time_dim}")
        self.widths = widths
        self.action_dim, self.condition_dim = action_dim, condition_dim
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(time_dim),
            nn.Linear(time_dim, 4 * time_dim),
            nn.Mish(),
            nn.Linear(4 * time_dim, time_dim),
        )

        def block(inputs: int, outputs: int) -> ResidualBlock1d:
            return ResidualBlock1d(inputs, outputs, kernel_size, groups)

        levels = list(zip((action_dim, *widths[:-1]), widths))
        self.down = nn.ModuleList(nn.ModuleList([block(i, o), block(o, o)]) for i, o in levels)
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, (1, 3), stride=(1, 2), padding=(0, 1)) for w in widths[:-1])
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]) for _ in range(2)])
        ups = list(reversed(levels[1:]))
        self.up = nn.ModuleList(nn.ModuleList([block(2 * o, i), block(i, i)]) for i, o in ups)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(i, i, (1, 4), stride=(1, 2), padding=(0, 1)) for i, _ in ups)
        self.last = nn.Sequential(
            ConvNormMish(widths[0], widths[0], kernel_size, groups), nn.Conv2d(widths[0], action_dim, 1)
        )
        self._film_sizes = [2 * b.outputs for b in self._blocks()]
        self.film_time = nn.Linear(time_dim, sum(self._film_sizes), bias=False)
        self.film_condition = nn.Linear(condition_dim, sum(self._film_sizes))

    @property
    def stride(self) -> int:
        """The horizon has to be a multiple of it."""
        return 2 ** (len(self.widths) - 1)

    def time_part(self, steps: Tensor) -> Tensor:
        """``W_t mish(e(t))`` for all blocks: int64 ``[B]`` → ``[B, F]``."""
        return self.film_time(F.mish(self.time_mlp(steps)))

    def condition_part(self, condition: Tensor) -> Tensor:
        """``W_c mish(c) + w`` for all blocks: ``[B, C]`` → ``[B, F]``."""
        return self.film_condition(F.mish(condition))

    def forward(self, actions: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        """See :class:`ConditionalUnet1d`."""
        return self.denoise(actions, self.time_part(steps) + self.condition_part(condition))

    def denoise(self, actions: Tensor, film: Tensor) -> Tensor:
        """The convolutions alone: actions ``[B, H, A]`` and ``film = time_part + condition_part`` ``[B, F]`` → ``[B, H, A]``."""
        films = iter(film.split(self._film_sizes, dim=1))
        x = actions.transpose(1, 2).unsqueeze(2)  # [B, A, 1, H], channels last in memory
        kept = []
        for level, (first, second) in enumerate(self.down):
            x = second(first(x, next(films)), next(films))
            kept.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.middle:
            x = block(x, next(films))
        # as in Diffusion Policy the outermost level has no skip connection: n levels, n - 1 ways up
        for (first, second), grow in zip(self.up, self.grow):
            x = second(first(torch.cat([x, kept.pop()], dim=1), next(films)), next(films))
            x = grow(x)
        return self.last(x).squeeze(2).transpose(1, 2)

    def _blocks(self) -> list[ResidualBlock1d]:
        """In the order in which they use their part of the FiLM vector."""
        return [
            *(b for level in self.down for b in level),
            *self.middle,  # type: ignore[list-item]
            *(b for level in self.up for b in level),
        ]


class ResidualBlock1d(nn.Module):
    """``conv(FiLM(conv(x))) + skip(x)``, each conv followed by GroupNorm and Mish; ``[B, I, 1, H]`` → ``[B, O, 1, H]``."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.first = ConvNormMish(inputs, outputs, kernel_size, groups)
        self.second = ConvNormMish(outputs, outputs, kernel_size, groups)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """``film`` ``[B, 2·O]``: scale − 1, then shift."""
        scale, shift = film[..., None, None].chunk(2, dim=1)
        h = self.first(x)
        return self.second(torch.addcmul(h + shift, h, scale)) + self.skip(x)


class ConvNormMish(nn.Sequential):
    """Convolution along the horizon that keeps its length, GroupNorm, Mish."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, groups: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, (1, kernel_size), padding=(0, kernel_size // 2)),
            nn.GroupNorm(groups, outputs),
            nn.Mish(),
        )


class SinusoidalEmbedding(nn.Module):
    """int64 ``[B]`` → float32 ``[B, dim]``: sines and cosines at frequencies from 1 down to 1/10,000."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents), persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        """See the class."""
        angles = steps.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
