"""What a decision costs, counted: encoder once per picture, denoiser once per step. Nothing here is timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.reporting.flops import count_flops
from xdfast.robot.policy import DiffusionPolicy

__all__ = ["DecisionCost", "count_decision"]


@dataclass(frozen=True)
class DecisionCost:
    """Multiply-accumulates of one decision of one robot, and parameters.

    Attributes:
        encoder_macs: of one picture.
        pictures: K cameras x T observations.
        condition_macs: linear layers from features to the condition, and from there to the denoiser's blocks (once a decision).
        step_macs: of one denoising step.
        steps: S.
        macs: pictures · encoder_macs + condition_macs + steps · step_macs.
        encoder_params, denoiser_params: numbers of parameters (of all encoders).
    """

    encoder_macs: int
    pictures: int
    condition_macs: int
    step_macs: int
    steps: int
    macs: int
    encoder_params: int
    denoiser_params: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class _Denoise(nn.Module):
    """One step of the denoising loop."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.unet = policy.diffusion.unet

    def forward(self, actions: Tensor, film: Tensor) -> Tensor:
        return self.unet.denoise(actions, film)


class _Condition(nn.Module):
    """What is done once a decision, between encoder and loop; the steps' own part included."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.heads, self.unet = policy.heads, policy.diffusion.unet
        self.register_buffer("steps", policy.diffusion.steps)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        pictures: Any = [head(x) for head, x in zip(self.heads, features.unbind(1))]
        steps: Any = self.steps
        part = self.unet.condition_part(condition) + self.unet.time_part(steps).sum(0)
        return part.sum() + sum(x.sum() for x in pictures)


def count_decision(policy: DiffusionPolicy) -> DecisionCost:
    """Counts by tracing (fvcore's formulas, products and normalisation; see :func:`xdfast.reporting.count_flops`).

    The policy is on the CPU for it and comes back to its device; its mode is left as it was.

    Raises:
        ValueError: an encoder that cannot be traced.
    """
    spec, unet = policy.spec, policy.diffusion.unet
    device = next(policy.parameters()).device
    policy.cpu()
    try:
        width = sum(unet._film_sizes)
        step = count_flops(
            _Denoise(policy), inputs=(torch.zeros(1, spec.horizon, spec.action_dim), torch.zeros(1, width))
        )
        cameras = len(spec.cameras)
        head: Any = policy.heads[0] if cameras else None
        features = torch.zeros(spec.n_obs, cameras, head.in_features if cameras else 1)
        condition = count_flops(_Condition(policy), inputs=(features, torch.zeros(1, unet.condition_dim)))
        encoder: Any = policy.encoders[0] if cameras else None
        picture = 0 if encoder is None else count_flops(encoder, encoder.image_size).macs
    finally:
        policy.to(device)
    pictures, steps = cameras * spec.n_obs, spec.diffusion.inference_steps
    return DecisionCost(
        encoder_macs=picture,
        pictures=pictures,
        condition_macs=condition.macs,
        step_macs=step.macs,
        steps=steps,
        macs=pictures * picture + condition.macs + steps * step.macs,
        encoder_params=sum(p.numel() for p in policy.encoders.parameters()) if cameras else 0,
        denoiser_params=sum(p.numel() for p in policy.diffusion.parameters()),
    )
