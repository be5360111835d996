"""The action head of a VLA that learns by diffusion: a small denoiser of the chunk, told by the action queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.ops._precision import without_autocast
from xdfast.robot.diffusion import Denoiser, Diffusion, DiffusionSettings
from xdfast.robot.unet1d import SinusoidalEmbedding

__all__ = ["ChunkDenoiser", "DiffusionHead"]


class ChunkDenoiser(nn.Module):
    r"""Noisy chunk, diffusion step and one condition per action → what the scheduler asks for, by residual MLPs.

    .. math::
        x_0 = W_x a, \quad
        x \leftarrow x + \mathrm{MLP}_\text{along}(\mathrm{FiLM}(\mathrm{norm}(x))), \quad
        x \leftarrow x + \mathrm{MLP}_\text{within}(\mathrm{FiLM}(\mathrm{norm}(x))), \quad
        \hat a = W_a \, \mathrm{FiLM}(\mathrm{norm}(x_{2 n}))

    The first MLP of a block mixes the H actions of a chunk (they have to agree on one of several ways), the second the numbers
    of one action, as in MLP-Mixer (arXiv 2105.01601). :math:`\mathrm{FiLM}(h) = (1 + s) h + b` with
    :math:`[s, b] = W_t \, \mathrm{mish}(e(t)) + W_c c + w` for all n blocks at once: the part of the condition is computed once per
    decision, that of the diffusion step is a table. Without a step and with W_c alone in the last FiLM it would be the linear
    head of a policy that learns by regression.

    Args:
        action_dim: A.
        horizon: H.
        condition_dim: C.
        width: W numbers per action inside.
        depth: n blocks.
        time_dim: size of the embedding of the diffusion step, even.

    Shape:
        ``actions`` ``[B, H, A]``, ``steps`` int64 ``[B]``, ``condition`` ``[B, H, C]`` → ``[B, H, A]``.

    Raises:
        ValueError: an odd ``time_dim``, or sizes below 1.
    """

    blocks: Any  # a list of blocks; a type checker sees only Module in a ModuleList

    def __init__(
        self, action_dim: int, horizon: int, condition_dim: int, *, width: int = 128, depth: int = 3, time_dim: int = 64
    ) -> None:
        super().__init__()
        if min(action_dim, horizon, condition_dim, width, depth) < 1:
            raise ValueError(
                f"sizes of a denoiser must be ≥ 1, got action_dim={action_dim}, horizon={horizon}, "
                f"condition_dim={condition_dim}, width={width}, depth={depth}"
            )
        if time_dim < 2 or time_dim % 2:
            raise ValueError(f"time_dim must be even, got {time_dim}")
        self.action_dim, self.horizon = action_dim, horizon
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(time_dim),
            nn.Linear(time_dim, 2 * time_dim),
            nn.Mish(),
            nn.Linear(2 * time_dim, time_dim),
        )
        self.enter = nn.Linear(action_dim, width)
        self.blocks = nn.ModuleList(_MixerBlock(horizon, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # FiLM scales and shifts
        self.leave = nn.Linear(width, action_dim)
        self._film_sizes = [2 * width] * (2 * depth + 1)
        self.film_time = nn.Linear(time_dim, sum(self._film_sizes), bias=False)
        self.film_condition = nn.Linear(condition_dim, sum(self._film_sizes))

    def time_part(self, steps: Tensor) -> Tensor:
        """``W_t mish(e(t))`` for all blocks: int64 ``[B]`` → ``[B, 1, F]``, the same for the H actions."""
        embedded = self.time_mlp[0](steps).to(self.film_time.weight.dtype)
        return self.film_time(F.mish(self.time_mlp[1:](embedded)))[:, None]

    def condition_part(self, condition: Tensor) -> Tensor:
        """``W_c c + w`` for all blocks: ``[B, H, C]`` → ``[B, H, F]``."""
        return self.film_condition(condition)

    def forward(self, actions: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        """See :class:`ChunkDenoiser`."""
        return self.denoise(actions, self.time_part(steps) + self.condition_part(condition))

    def denoise(self, actions: Tensor, film: Tensor) -> Tensor:
        """The blocks alone: actions ``[B, H, A]`` and ``film = time_part + condition_part`` ``[B, H, F]`` → ``[B, H, A]``."""
        films = film.split(self._film_sizes, dim=-1)
        x = self.enter(actions)
        for index, block in enumerate(self.blocks):
            x = block(x, films[2 * index], films[2 * index + 1])
        return self.leave(_film(self.norm(x), films[-1]))


class _MixerBlock(nn.Module):
    """An MLP over the H actions of each channel, then one over the channels of each action; ``[B, H, W]`` → the same."""

    def __init__(self, horizon: int, width: int) -> None:
        super().__init__()
        self.along_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.along = nn.Sequential(nn.Linear(horizon, 4 * horizon), nn.GELU(), nn.Linear(4 * horizon, horizon))
        self.within_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, along: Tensor, within: Tensor) -> Tensor:
        """``along``, ``within`` ``[B, H, 2 W]``: scale − 1, then shift."""
        x = x + self.along(_film(self.along_norm(x), along).transpose(1, 2)).transpose(1, 2)
        return x + self.within(_film(self.within_norm(x), within))


def _film(x: Tensor, film: Tensor) -> Tensor:
    """(1 + scale) x + shift; ``film`` holds both, one after the other."""
    scale, shift = film.chunk(2, dim=-1)
    return torch.addcmul(x + shift, x, scale)


class DiffusionHead(Diffusion):
    """A :class:`ChunkDenoiser` with its scheduler; it computes in the dtype of its weights.

    Autocast does not reach it, except in training on a GPU: on a CPU bfloat16 costs a small denoiser more in conversions than
    it saves, and a chunk that is denoised in bfloat16 carries its rounding from step to step.

    Args:
        denoiser: what is repeated.
        settings: of the scheduler.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: bad settings.

    Shape:
        condition ``[B, H, C]``, chunks ``[B, H, A]``, noise ``[S, B, H, A]``.
    """

    unet: ChunkDenoiser

    def __init__(self, denoiser: ChunkDenoiser, settings: DiffusionSettings) -> None:
        super().__init__(denoiser, settings)

    def loss(self, actions: Tensor, condition: Tensor, draws: int = 1) -> Tensor:
        """See :meth:`Diffusion.loss`."""
        kind, dtype = condition.device.type, self.unet.leave.weight.dtype
        with torch.autocast(kind, enabled=kind == "cuda" and torch.is_autocast_enabled("cuda")):
            return super().loss(actions.to(dtype), condition.to(dtype), draws)

    def sample(self, condition: Tensor, noise: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        """See :meth:`Diffusion.sample`.

        Raises:
            ValueError: noise of another shape.
        """
        wanted = self.noise_shape(condition.shape[0])
        if tuple(noise.shape) != wanted:
            raise ValueError(
                f"expected noise {list(wanted)}, got {list(noise.shape)}; vla.noise({len(condition)}) makes it"
            )
        with without_autocast(condition.device):
            return super().sample(condition.to(self.unet.leave.weight.dtype), noise, denoiser)

    def noise_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Of what :meth:`sample` starts from, and of what each of ddpm's steps adds."""
        return self.noise_count, batch, self.unet.horizon, self.unet.action_dim
