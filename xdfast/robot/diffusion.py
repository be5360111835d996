"""Noise in, actions out: training targets by a ``diffusers`` scheduler, sampling from a table of its constants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast._optional import require
from xdfast.errors import nearest

__all__ = ["PREDICTIONS", "SCHEDULERS", "Denoiser", "Diffusion", "DiffusionSettings"]

SCHEDULERS = ("ddim", "ddpm")
PREDICTIONS = ("sample", "epsilon")


@dataclass(frozen=True)
class DiffusionSettings:
    """How actions are noised and denoised.

    Attributes:
        scheduler: ``"ddim"`` (Song et al. 2021, η = 0) or ``"ddpm"`` (Ho et al. 2020).
        prediction: what the network predicts, the clean ``"sample"`` or the noise ``"epsilon"``.
        train_steps: T diffusion steps, squared-cosine schedule.
        inference_steps: S ≤ T of them at inference; ``"ddpm"`` may skip steps, too.
    """

    scheduler: str = "ddim"
    prediction: str = "sample"
    train_steps: int = 100
    inference_steps: int = 10

    def validate(self) -> None:
        """Raises ValueError: an unknown name, or more inference steps than training steps."""
        for name, value, known in (
            ("scheduler", self.scheduler, SCHEDULERS),
            ("prediction", self.prediction, PREDICTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.{nearest(value, known)}")
        if self.train_steps < 2:
            raise ValueError(f"train_steps must be ≥ 2, got {self.train_steps}")
        if not 1 <= self.inference_steps <= self.train_steps:
            raise ValueError(
                f"inference_steps must be between 1 and train_steps ({self.train_steps}), got {self.inference_steps}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Denoiser(Protocol):
    """What :class:`Diffusion` repeats: a module in three parts, so that no part is computed more often than it has to be."""

    def condition_part(self, condition: Tensor) -> Tensor:
        """``[B, …, C]`` → ``[B, …, F]``."""

    def time_part(self, steps: Tensor) -> Tensor:
        """int64 ``[B]`` → ``[B, …, F]``, to be added to that."""

    def denoise(self, actions: Tensor, film: Tensor) -> Tensor:
        """Noisy actions ``[B, H, A]`` and the sum of both parts → what the scheduler asks for, ``[B, H, A]``."""


class Diffusion(nn.Module):
    """A denoiser with its scheduler.

    The scheduler is diffusers' (squared-cosine betas, clean actions clipped to [-1, 1]); it noises in training, and its
    constants are read into one table, so that a denoising step is ``x ← p · clip(x̂₀) + q · x + r · ε̂ + s · noise`` with four
    numbers per step: the same values as ``scheduler.step`` (a test compares them), without its bookkeeping, and
    capturable in a CUDA graph.

    Args:
        unet: the denoiser, such as :class:`xdfast.robot.unet1d.ConditionalUnet1d`.
        settings: see :class:`DiffusionSettings`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: bad settings.
    """

    unet: Any  # a Denoiser; whoever made it knows its sizes
    table: Tensor
    steps: Tensor
    alphas_cumprod: Tensor

    def __init__(self, unet: Denoiser, settings: DiffusionSettings) -> None:
        super().__init__()
        settings.validate()
        self.unet, self.settings = unet, settings
        scheduler = make_scheduler(settings)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)
        steps, table = _table(scheduler, settings)
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def loss(self, actions: Tensor, condition: Tensor, draws: int = 1) -> Tensor:
        """Mean squared error of the denoiser at random steps, over ``draws`` draws of step and noise per row.

        The encoder is the cost of training: several draws use each encoded image more than once.

        Args:
            actions: normalised, ``[B, H, A]``.
            condition: ``[B, C]``, or what the denoiser takes.
            draws: K.

        Returns:
            scalar; step and noise come from torch's global generator.
        """
        film = self.unet.condition_part(condition)
        if draws > 1:
            film, actions = film.repeat(draws, *[1] * (film.ndim - 1)), actions.repeat(draws, 1, 1)
        noise = torch.randn_like(actions)
        steps = torch.randint(0, self.settings.train_steps, (len(actions),), device=actions.device)
        keep = self.alphas_cumprod[steps][:, None, None]
        noisy = (
            keep.sqrt() * actions + (1 - keep).sqrt() * noise
        )  # scheduler.add_noise, without its copies to the device
        predicted = self.unet.denoise(noisy, film + self.unet.time_part(steps))
        target = actions if self.settings.prediction == "sample" else noise
        return F.mse_loss(predicted.float(), target.float())

    def sample(self, condition: Tensor, noise: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        """Actions ``[B, H, A]`` in [-1, 1].

        Args:
            condition: as in :meth:`loss`.
            noise: standard normal ``[S + 1, B, H, A]`` for ddpm, ``[1, B, H, A]`` suffices for ddim: the start, then what
                each step adds. Given from outside, so that an episode's noise does not depend on which others run beside it.
            denoiser: in the network's place, such as :class:`xdfast.robot.packed_unet.PackedUnet`.
        """
        denoiser = self.unet if denoiser is None else denoiser
        film = denoiser.condition_part(condition)
        times = denoiser.time_part(self.steps)  # [S, F]
        x = noise[0].to(film.dtype)
        stochastic = self.settings.scheduler == "ddpm"
        for index in range(len(self.steps)):
            added = noise[index + 1] if stochastic else None
            x = self.step(x, film + times[index], self.table[index], added, denoiser)
        return x

    def step(
        self, x: Tensor, film: Tensor, row: Tensor, noise: Tensor | None = None, denoiser: Denoiser | None = None
    ) -> Tensor:
        """One denoising step, ``p · clip(x̂₀) + q · x + r · ε̂ + s · noise``.

        Args:
            x: noisy actions ``[B, H, A]``.
            film: both parts of the denoiser's condition for this step, summed.
            row: of ``table``, ``[6]``.
            noise: what ddpm adds, ``[B, H, A]``; None for ddim.
            denoiser: as in :meth:`sample`.
        """
        predicted = (self.unet if denoiser is None else denoiser).denoise(x, film)
        p, q, r, s, keep, spread = row.to(x.dtype).unbind()
        if self.settings.prediction == "sample":
            clean, added = predicted, (x - keep * predicted) / spread
        else:
            clean, added = (x - spread * predicted) / keep, predicted
        x = p * clean.clamp(-1, 1) + q * x + r * added
        return x if noise is None else x + s * noise

    @property
    def noise_count(self) -> int:
        """Leading size of ``noise`` in :meth:`sample`."""
        return 1 + (len(self.steps) if self.settings.scheduler == "ddpm" else 0)


def make_scheduler(settings: DiffusionSettings) -> Any:
    """The ``diffusers`` scheduler of these settings, its inference steps set."""
    diffusers = require("diffusers", extra="robot", purpose="diffusion policies")
    shared: dict[str, Any] = {
        "num_train_timesteps": settings.train_steps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": settings.prediction,
        "clip_sample": True,
    }
    if settings.scheduler == "ddim":
        scheduler = diffusers.DDIMScheduler(**shared, set_alpha_to_one=True, steps_offset=0)
    else:
        scheduler = diffusers.DDPMScheduler(**shared, variance_type="fixed_small")
    scheduler.set_timesteps(settings.inference_steps)
    return scheduler


def _table(scheduler: Any, settings: DiffusionSettings) -> tuple[Tensor, Tensor]:
    """(steps int64 [S], table float32 [S, 6]: p, q, r, s, √ᾱ, √(1 − ᾱ) of each step)."""
    keep = scheduler.alphas_cumprod.double()
    steps = scheduler.timesteps.long()
    apart = settings.train_steps // settings.inference_steps
    rows = []
    for step in steps.tolist():
        now = keep[step]
        before = keep[step - apart] if step - apart >= 0 else torch.ones((), dtype=torch.float64)
        p = q = r = s = torch.zeros((), dtype=torch.float64)
        if settings.scheduler == "ddim":  # eq. 12 of Song et al. with σ = 0
            p, r = before.sqrt(), (1 - before).sqrt()
        else:  # eq. 6 and 7 of Ho et al. for a step that may span several
            alpha = now / before
            p = before.sqrt() * (1 - alpha) / (1 - now)
            q = alpha.sqrt() * (1 - before) / (1 - now)
            if step > 0:
                s = ((1 - before) / (1 - now) * (1 - alpha)).clamp(min=1e-20).sqrt()
        rows.append(torch.stack([p, q, r, s, now.sqrt(), (1 - now).sqrt()]))
    return steps, torch.stack(rows).float()
