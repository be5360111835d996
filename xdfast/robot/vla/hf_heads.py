"""How actions leave a Hugging Face style VLA: regression, bins of the vocabulary, diffusion. All work on normalised chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.robot.vla.denoiser import ChunkDenoiser, DiffusionHead
from xdfast.robot.vla.hf_spec import BINS, HuggingFaceSpec

__all__ = ["BinsHead", "DenoisedHead", "RegressionHead", "action_head"]


class RegressionHead(nn.Module):
    """Action queries → chunk by an MLP; L1.

    Shape:
        [B, Q, D] → [B, H, A].
    """

    def __init__(self, width: int, queries: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.slots, self.shape = queries, (horizon, action_dim)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, horizon // queries * action_dim)

    def decode(self, asked: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(asked))).reshape(len(asked), *self.shape)

    def loss(self, asked: Tensor, target: Tensor, draws: int = 1) -> Tensor:
        return F.l1_loss(self.decode(asked).float(), target)

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        return 0, batch


class DenoisedHead(nn.Module):
    """Action queries tell a denoiser of the chunk; a query speaks for H / Q actions in turn (CogACT: one for all).

    Shape:
        [B, Q, D], noise [S, B, H, A] → [B, H, A].
    """

    def __init__(self, width: int, spec: HuggingFaceSpec) -> None:
        super().__init__()
        assert spec.diffusion is not None
        self.slots, self.each = spec.queries, spec.horizon // spec.queries
        sizes = {"width": spec.denoiser_width, "depth": spec.denoiser_depth}
        self.diffusion = DiffusionHead(ChunkDenoiser(spec.action_dim, spec.horizon, width, **sizes), spec.diffusion)

    def decode(self, asked: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = asked.new_zeros(self.noise_shape(len(asked)), dtype=torch.float32) if noise is None else noise
        weight = next(self.diffusion.parameters())
        return self.diffusion.sample(asked.repeat_interleave(self.each, 1), noise.to(weight))

    def loss(self, asked: Tensor, target: Tensor, draws: int = 1) -> Tensor:
        return self.diffusion.loss(target, asked.repeat_interleave(self.each, 1), draws)

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        return self.diffusion.noise_shape(batch)


class BinsHead(nn.Module):
    r"""OpenVLA's: a number of an action in [-1, 1] is one of 256 ids at the end of the vocabulary.

    With edges :math:`e_1 = -1 < \dots < e_{256} = 1` and V one past the last id, a number x with
    :math:`e_d \le x < e_{d+1}` has id :math:`V - d`, and an id stands for the middle of its bin, :math:`(e_d + e_{d+1}) / 2`
    (the last d for that of the bin before it, as in OpenVLA). Only these 256 rows of the language head are kept: the argmax is
    over actions alone.

    Shape:
        [B, H·A, D] → [B, H, A]. Indices, 0 … 255, count the ids from V - 256.

    Reference:
        "OpenVLA: An Open-Source Vision-Language-Action Model", arXiv 2406.09246.
    """

    def __init__(self, width: int, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.slots, self.shape = horizon * action_dim, (horizon, action_dim)
        self.linear = nn.Linear(width, BINS, bias=False)
        nn.init.normal_(self.linear.weight, std=width**-0.5)

    def encode(self, actions: Tensor) -> Tensor:
        """Normalised ``[B, H, A]``, clipped to [-1, 1] → indices int64 ``[B, H·A]``."""
        digit = torch.bucketize(actions.clamp(-1, 1).double().contiguous(), _edges(actions), right=True)
        return BINS - digit.flatten(1)

    def centres(self, index: Tensor) -> Tensor:
        """Indices ``[B, H·A]`` → ``[B, H, A]``, float32."""
        edges = _edges(index)
        middle = (edges[:-1] + edges[1:]) / 2
        return middle[(BINS - 1 - index).clamp(max=BINS - 2)].float().unflatten(1, self.shape)

    def decode(self, asked: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.centres(self.linear(asked).argmax(-1))

    def loss(self, asked: Tensor, target: Tensor, draws: int = 1) -> Tensor:
        return F.cross_entropy(self.linear(asked).float().flatten(0, 1), self.encode(target).flatten())

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        return 0, batch


def _edges(like: Tensor) -> Tensor:
    """No buffer: that would be rounded with the weights."""
    return torch.linspace(-1, 1, BINS, dtype=torch.float64, device=like.device)


def action_head(spec: HuggingFaceSpec, width: int) -> Any:
    """The head of a spec; ``slots`` are the tokens at the end that it reads."""
    if spec.head == "bins":
        return BinsHead(width, spec.horizon, spec.action_dim)
    if spec.head == "diffusion":
        return DenoisedHead(width, spec)
    return RegressionHead(width, spec.queries, spec.horizon, spec.action_dim)
