"""One decision of a diffusion policy: ours against the loop as it is usually written, and its parts.

The rival is the same network with the same weights, denoising as published code does: at every step the U-Net projects the
condition and the diffusion step anew for all of its blocks, and ``scheduler.step`` of diffusers makes the update.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from xdfast.bench.harness import interleave, ratios
from xdfast.robot import DiffusionPolicy, DiffusionSettings, PolicySpec, build_encoder
from xdfast.robot.diffusion import make_scheduler
from xdfast.robot.runner import PolicyRunner, example, measure_latency

__all__ = ["MUST_REACH_MS", "SIZES", "make_policy", "measure", "published_decision"]

#: Of one decision on two CPU cores: 10 DDIM steps, ResNet-18, 96 px.
MUST_REACH_MS = 60.0

#: The denoiser of recipe policy-metaworld, and the field's.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"n_obs": 1, "unet_widths": (64, 128)},
    "field": {"n_obs": 2, "unet_widths": (512, 1024, 2048)},
}


def make_policy(size: str) -> DiffusionPolicy:
    """ResNet-18 with GroupNorm at 84 of 96 px, random weights from a fixed seed."""
    torch.manual_seed(0)
    encoder, facts = build_encoder("resnet18", image_size=84)
    spec = PolicySpec(
        4, 9, ("dp3",), (96, 96), crop=84, encoder=facts, diffusion=DiffusionSettings(inference_steps=10), **SIZES[size]
    )
    return DiffusionPolicy(spec, encoder).eval()


@torch.no_grad()
def published_decision(policy: DiffusionPolicy, scheduler: Any, images: Tensor, state: Tensor, noise: Tensor) -> Tensor:
    """The usual loop: U-Net with its condition, then scheduler.step, ten times."""
    condition = policy.condition(policy.features(images), state)
    x = noise[0]
    for step in scheduler.timesteps:
        predicted = policy.diffusion.unet(x, step.expand(len(x)).to(x.device), condition)
        x = scheduler.step(predicted, step, x).prev_sample
    first = policy.spec.n_obs - 1
    return policy.action_norm.inverse(x[:, first : first + policy.spec.n_action])


def measure(size: str, *, batch: int = 1, device: str = "cpu", budget: float = 30.0) -> dict[str, Any]:
    """Milliseconds of a decision by candidate, ratios to the usual loop, and the parts of ours.

    A decision of the field's size takes a second on two cores: then there are fewer rounds, so that all of it ends in about
    three times ``budget``; what is done is told on stderr.
    """

    def tell(what: str) -> None:
        print(f"{size}, batch {batch}: {what}", file=sys.stderr, flush=True)

    tell("making the policy")
    policy = make_policy(size).to(device)
    images, state, noise = (None if x is None else x.to(device) for x in example(policy, batch))
    assert images is not None and state is not None and noise is not None
    scheduler = make_scheduler(policy.spec.diffusion)
    runners = {"ours": PolicyRunner(policy, batch, device=device)}
    if device == "cpu":
        runners["ours, by modules"] = PolicyRunner(policy, batch, packed=False)
    if device == "cuda":
        runners["ours, no graph"] = PolicyRunner(policy, batch, device=device, graph=False)
    elif size == "small":  # compiling the field's takes minutes
        runners["ours, compiled loop"] = PolicyRunner(policy, batch, device=device, compile=True)
    theirs = published_decision(policy, scheduler, images, state, noise).cpu()
    candidates: dict[str, Any] = {
        "usual loop": lambda: published_decision(policy, scheduler, images, state, noise).cpu()
    }
    for name, runner in runners.items():
        tell(f"{name}: the same actions as the usual loop?")
        difference = (torch.from_numpy(runner.act(images, state, noise)) - theirs).abs().max()
        assert difference < 1e-3, f"{name} differs by {difference}"
        candidates[name] = lambda runner=runner: runner.act(images, state, noise)
    tell(f"{', '.join(candidates)} in turns, about {budget:.0f} s")
    times = interleave(candidates, budget=budget, rounds=(5, 200), device=device)
    # each of its runs, and of the five that warm up, is a whole decision and its parts once more
    runs = max(5, min(50, int(budget / (2 * statistics.median(times["ours"]))) - 5))
    tell(f"the parts of a decision, {runs} times")
    latency = measure_latency(policy, batch=batch, runs=runs, device=device)
    return {
        "batch": batch,
        "rounds": len(times["ours"]),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "median_ms": {name: 1e3 * statistics.median(samples) for name, samples in times.items()},
        "p95_ms": {name: 1e3 * statistics.quantiles(samples, n=20)[-1] for name, samples in times.items()},
        "slower_than_ours": ratios(times, "ours"),
        "encode_ms": latency.encode,
        "denoise_ms": latency.denoise,
        "how": {name: runner.reason for name, runner in runners.items()},
    }
