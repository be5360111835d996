"""Settings of the training of a compact vision-language-action model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xdfast.pipeline.policy_config import ActingConfig, DenoisingConfig

__all__ = ["VLAConfig"]


@dataclass(kw_only=True)
class VLAConfig(DenoisingConfig, ActingConfig):
    """One policy for several tasks, told by a sentence which: a :class:`xdfast.robot.vla.CompactVLA` learns from demonstrations."""

    tasks: tuple[str, ...]
    """metaworld/drawer-open-v3, …: `xdfast demos tasks` lists them."""
    model: str = "resnet18"
    """Encoder: folder that distill or finetune wrote, timm name, NAME@/path/to/weights."""
    demos: str = "10"
    """How many demonstrations the scripted expert gives of each task, or a folder with a folder of demonstrations per task."""
    demo_seed: int = 0
    """First seed of the episodes that the expert solves."""
    demo_noise: float = 0.0
    """Standard deviation of noise on what the expert executes (actions span [-1, 1]; recorded is what it wanted): episodes
    then show the way back, too (DART, arXiv 1703.09327)."""
    cameras: tuple[str, ...] = ()
    """Cameras to look through; default: the first task's first."""
    image_size: int | None = None
    """Side of a picture in pixels; default: 96 for the expert's, the demonstrations' own otherwise."""
    crop: int | None = None
    """Side of the square cut from it, at random in training; default: 7/8 of the picture."""
    model_pretrained: bool = False
    """A timm name comes with its published weights."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model."""
    encoder_lr: float | None = None
    """Learning rate of the encoder; default: lr."""
    norm: Literal["auto", "frozen", "group", "batch"] = "auto"
    """What the encoder's BatchNorm layers become; auto: frozen if it was trained before, GroupNorm if not."""
    level: int = -2
    """Feature map of the encoder whose cells are tokens; -1: the last."""
    width: int = 256
    layers: int = 8
    heads: int = 4
    horizon: int = 16
    """Actions predicted."""
    n_action: int = 8
    """Of them executed before the next decision."""
    text_length: int = 16
    """Words of an instruction, padding included."""
    objective: Literal["l1", "smooth_l1", "diffusion"] = "l1"
    """Of the action head: regression, or a small denoiser of the chunk, to which alone the settings of diffusion belong."""
    denoiser_width: int = 128
    denoiser_depth: int = 3
    """Blocks of the denoiser."""
    steps: int = 3000
    """Optimiser updates."""
    weight_decay: float = 1e-4

    def validate(self) -> None:
        """Checks every value before any work.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        from xdfast.robot.diffusion import DiffusionSettings

        self._validate_acting()
        self._positive(
            "image_size", "crop", "encoder_lr", "width", "layers", "heads", "horizon", "n_action", "text_length",
            "denoiser_width", "denoiser_depth", "noise_draws",
        )  # fmt: skip
        self._not_negative("demo_seed")
        self._check_noise(self.demo_noise)
        self._one_of("norm", ("auto", "frozen", "group", "batch"))
        self._one_of("objective", ("l1", "smooth_l1", "diffusion"))
        DiffusionSettings(self.scheduler, self.prediction, self.train_steps, self.inference_steps).validate()
        if not self.tasks or isinstance(self.tasks, str):
            raise ValueError(
                f"tasks must be a list of tasks such as ['drawer-open', 'drawer-close'], got {self.tasks!r}"
            )
        if self.n_action > self.horizon:
            raise ValueError(f"n_action ({self.n_action}) must not exceed horizon ({self.horizon})")
        if self.crop is not None and self.image_size is not None and self.crop > self.image_size:
            raise ValueError(f"crop ({self.crop}) must not exceed image_size ({self.image_size})")
        if self.demos.isdigit() and int(self.demos) < 1:
            raise ValueError(f"demos must be a number ≥ 1 or a path, got {self.demos!r}")
