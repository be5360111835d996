"""Settings of a policy's training and evaluation: Python call, command line and YAML in one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from xdfast.pipeline.config import RunConfig, _Config
from xdfast.settings import FREE_SETTINGS

__all__ = ["ActingConfig", "DenoisingConfig", "EvaluatePolicyConfig", "PolicyConfig", "StepsConfig"]

#: Seeds of evaluation episodes start here, far from those of demonstrations (which start at 0).
EVAL_SEED = 100_000


@dataclass(kw_only=True)
class StepsConfig(RunConfig):
    """What trainings have that count updates instead of epochs."""

    batch_size: int = 32
    """Samples per step and process."""
    steps: int = 1500
    """Optimiser updates."""
    warmup_steps: int = 50
    evaluate_every: int | None = None
    """Updates between closed-loop evaluations; default: only at the end. The best policy is kept beside the last."""
    optimizer: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 1e-6
    clip_grad: float | None = 1.0
    min_lr: float = 0.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of the encoder; on a GPU of the denoiser, too."""
    ema: float | None = 0.9999
    """Largest decay of the moving average that becomes the policy."""
    ema_power: float = 0.75
    """The decay after k updates is 1 - (1 + k) ** -ema_power, if that is less."""
    channels_last: bool = True
    workers: int | Literal["auto"] = "auto"
    """Processes that collect demonstrations and simulate."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"…"""
    seed: int = 0
    """Same seed, same result."""

    # Of the loop; a policy has no use for another value.
    parallel: ClassVar[str] = "ddp"
    sync_batchnorm: ClassVar[bool] = False
    overlap: ClassVar[bool] = False
    eval_every: ClassVar[int] = 1
    decay_epochs: ClassVar[int] = 1

    @property
    def epoch_steps(self) -> int:
        """Updates in what the loop calls an epoch: from one evaluation to the next."""
        return self.evaluate_every or self.steps

    @property
    def epochs(self) -> int:
        """Of the loop."""
        return self.steps // self.epoch_steps

    @property
    def warmup_epochs(self) -> float:
        """Of the loop, in the same unit."""
        return self.warmup_steps / self.epoch_steps

    def _validate_steps(self) -> None:
        self._validate_run()
        self._positive("batch_size", "steps", "evaluate_every", "ema_power")
        self._not_negative("warmup_steps")
        if self.steps % self.epoch_steps:
            raise ValueError(f"evaluate_every ({self.evaluate_every}) must divide steps ({self.steps})")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")


@dataclass(kw_only=True)
class ActingConfig(StepsConfig):
    """What trainings of robots' policies have: episodes in simulation while they train."""

    episodes: int = 0
    """Episodes of an evaluation (of each task); 0: none."""
    eval_seed: int = EVAL_SEED
    """Seed of the first of them."""
    max_steps: int | None = None
    """Longest episode; default: the task's."""
    envs: int | None = None
    """Episodes simulated side by side; default: up to 10, fewer where memory or cores are few."""

    FREE: ClassVar[frozenset[str]] = FREE_SETTINGS | {"envs"}

    def _validate_acting(self) -> None:
        self._validate_steps()
        self._positive("max_steps", "envs")
        self._not_negative("episodes", "eval_seed")

    @staticmethod
    def _check_noise(demo_noise: float | None) -> None:
        if demo_noise is not None and not 0 <= demo_noise <= 1:
            raise ValueError(f"demo_noise must be from 0 to 1, got {demo_noise!r}: actions span [-1, 1]")


@dataclass(kw_only=True)
class DenoisingConfig:
    """What policies have that learn by diffusion."""

    scheduler: Literal["ddim", "ddpm"] = "ddim"
    prediction: Literal["sample", "epsilon"] = "sample"
    """What the denoiser predicts: the clean actions, or the noise."""
    train_steps: int = 100
    """Diffusion steps."""
    inference_steps: int = 10
    """Of them taken by a decision."""
    noise_draws: int = 8
    """Draws of noise and diffusion step per sample and update: the denoiser is cheap beside what it is told."""


@dataclass(kw_only=True)
class PolicyConfig(DenoisingConfig, ActingConfig):
    """A diffusion policy learns from demonstrations, together with the encoder of its pictures.

    The defaults train a ResNet-18 on two CPU cores in minutes; recipe ``policy-gpu`` has the field's.
    """

    task: str
    """metaworld/drawer-open-v3, adroit/door, … (`xdfast demos tasks` lists them), or a name of your own for demonstrations
    from elsewhere: then nothing is simulated."""
    model: str = "resnet18"
    """Encoder: folder that distill or finetune wrote, timm name, NAME@/path/to/weights. Its classifier is dropped."""
    demos: str = "10"
    """How many demonstrations the scripted expert gives, or a folder or file of demonstrations (ours, LeRobot v3,
    diffusion_policy zarr, robomimic HDF5)."""
    demo_limit: int | None = None
    """Take only the first so many of a folder's demonstrations."""
    demo_seed: int = 0
    """First seed of the episodes that the expert solves."""
    demo_noise: float = 0.0
    """Standard deviation of noise on what the expert executes (actions span [-1, 1]; recorded is what it wanted): episodes
    then show the way back, too (DART, arXiv 1703.09327)."""
    cameras: tuple[str, ...] = ()
    """Cameras to look through; default: the task's first, or all of the demonstrations'."""
    image_size: int | None = None
    """Side of a picture in pixels; default: 96 for the expert's, the demonstrations' own otherwise."""
    crop: int | None = None
    """Side of the square cut from it, at random in training; default: 7/8 of the picture."""
    model_size: int | None = None
    """Input size of the encoder; default: the crop (to which a ViT's position embeddings are resampled)."""
    model_pretrained: bool = False
    """A timm name comes with its published weights."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model."""
    encoder: Literal["joint", "frozen"] = "joint"
    """Train the encoder with the policy, or leave it alone (its features are then computed once)."""
    encoder_lr: float | None = None
    """Learning rate of the encoder; default: lr."""
    norm: Literal["auto", "frozen", "group", "batch"] = "auto"
    """What the encoder's BatchNorm layers become; auto: frozen if it was trained before, GroupNorm if not."""
    share_encoder: bool = True
    """One encoder for all cameras, or a copy for each."""
    n_obs: int = 1
    """Observations a decision sees."""
    horizon: int = 16
    """Actions predicted."""
    n_action: int = 8
    """Of them executed before the next decision."""
    feature_dim: int = 64
    """Numbers per picture that reach the denoiser."""
    unet_widths: tuple[int, ...] = (64, 128)
    """Channels of the denoiser's levels."""
    kernel_size: int = 5
    feature_crops: int = 8
    """Frozen encoder: so many fixed crops of every frame, one of which is drawn per sample."""
    episodes: int = 20
    """Episodes of an evaluation; 0: none."""

    def validate(self) -> None:
        """Checks every value before any work.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        from xdfast.robot.diffusion import DiffusionSettings

        self._validate_acting()
        self._positive(
            "demo_limit", "image_size", "crop", "model_size", "encoder_lr", "n_obs", "horizon", "n_action", "feature_dim",
            "kernel_size", "noise_draws", "feature_crops",
        )  # fmt: skip
        self._not_negative("demo_seed")
        self._check_noise(self.demo_noise)
        self._one_of("encoder", ("joint", "frozen"))
        self._one_of("norm", ("auto", "frozen", "group", "batch"))
        if self.crop is not None and self.image_size is not None and self.crop > self.image_size:
            raise ValueError(f"crop ({self.crop}) must not exceed image_size ({self.image_size})")
        if self.encoder == "frozen" and self.encoder_lr is not None:
            raise ValueError("encoder_lr has no meaning with encoder='frozen'; leave one of them out")
        if self.demos.isdigit() and int(self.demos) < 1:
            raise ValueError(f"demos must be a number ≥ 1 or a path, got {self.demos!r}")
        if self.norm == "batch" and self.ema is not None and self.encoder == "joint":
            # documented in METHODS: BatchNorm statistics of small, alike batches and an average of weights do not mix
            raise ValueError(
                "norm='batch' does not go with the moving average of the weights; use norm='frozen' or 'group', or ema=None"
            )
        DiffusionSettings(self.scheduler, self.prediction, self.train_steps, self.inference_steps).validate()


@dataclass(kw_only=True)
class EvaluatePolicyConfig(_Config):
    """Closed-loop success rate of a policy in simulation."""

    model: str
    """A policy's run folder."""
    task: str | None = None
    """Task; default: the policy's own."""
    other_task: bool = False
    """Evaluate in a task the policy did not learn, which is an error otherwise."""
    episodes: int = 50
    eval_seed: int = EVAL_SEED
    """Seed of the first episode."""
    max_steps: int | None = None
    """Longest episode; default: the task's."""
    envs: int | None = None
    """Episodes simulated side by side; default: up to 10, fewer where memory or cores are few."""
    videos: int = 3
    """Videos of the first so many successes, and of as many failures."""
    saliency: bool = True
    """Draw what the encoder looks at over an episode (saliency.png; needs captum, of the analysis extra)."""
    which: Literal["best", "last"] = "last"
    """The last policy, or the one that was best in the evaluations during training."""
    out: str | None = None
    """Folder for the results; default: the run's."""
    device: str = "auto"
    progress: bool = True

    def validate(self) -> None:
        """Checks every value; see :meth:`PolicyConfig.validate`."""
        self._positive("episodes", "max_steps", "envs")
        self._not_negative("videos", "eval_seed")
        self._one_of("which", ("best", "last"))
