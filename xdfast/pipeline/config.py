"""One definition of every setting: a dataclass is the Python call, the command line and the YAML file.

``validate()`` runs once, before any work, and names the bad value and the fix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from xdfast.data.decoder import DECODERS
from xdfast.errors import nearest
from xdfast.recipes.load import load_yaml
from xdfast.settings import FREE_SETTINGS

__all__ = [
    "DistillConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "RunConfig",
    "TrainConfig",
    "load_yaml",
    "save_yaml",
]

C = TypeVar("C", bound="_Config")


@dataclass(kw_only=True)
class _Config:
    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any], *, source: str = "settings") -> C:
        """A config from plain values; unknown keys are errors that offer the nearest names.

        Raises:
            ValueError: an unknown key, or a required one missing.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = cls.normalised(values)
        for key in values:
            if key not in known:
                raise ValueError(f"{source}: {cls.__name__} has no setting {key!r}.{nearest(key, known)}")
        required = [
            n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{source}: {cls.__name__} needs {', '.join(missing)}")
        tuples = {n for n, f in known.items() if str(f.type).startswith("tuple")}
        return cls(**{k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in values.items()})

    @classmethod
    def normalised(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values as the fields take them, where there is another way to write some."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, ready for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Plain values of all settings that need not be given."""
        found = {}
        for f in dataclasses.fields(cls):
            if f.default_factory is not dataclasses.MISSING:
                found[f.name] = f.default_factory()
            elif f.default is not dataclasses.MISSING:
                found[f.name] = f.default
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value!r}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, got {value!r}.{nearest(str(value), allowed)}"
            )

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be ≥ 0, got {value!r}")


@dataclass(kw_only=True)
class _DataConfig(_Config):
    data: str
    """Training images: a folder of class folders (with train/ and val/ inside, or split here), a zip archive of one,
    "torchvision:CIFAR10", or "sklearn:digits"."""
    val_data: str | None = None
    """Validation images; default: the val/ part of `data`, or a stratified split of it."""
    val_fraction: float = 0.2
    """Part split off for validation where `data` has no val/ of its own."""
    labels_per_class: int | None = None
    """Keep only this many training images of each class."""
    batch_size: int = 128
    """Images per step and process."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes (threads under DALI); auto: none for small in-memory sets, else one per core."""
    decoder: Literal["auto", "pillow", "dali", "dali-gpu"] = "auto"
    """What decodes JPEGs; auto: DALI on the CPU where it is installed and helps. `xdfast doctor` shows it."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"…"""
    seed: int = 0
    """Same seed, same result."""

    def _validate_data(self) -> None:
        self._positive("batch_size", "labels_per_class")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction!r}")
        if self.decoder not in DECODERS:
            raise ValueError(
                f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}.{nearest(self.decoder, DECODERS)}"
            )
        if self.workers != "auto" and (not isinstance(self.workers, int) or self.workers < 0):
            raise ValueError(f"workers must be 'auto' or an integer ≥ 0, got {self.workers!r}")


@dataclass(kw_only=True)
class RunConfig(_Config):
    """What every training run has: a folder, an optimiser, the loop's settings."""

    out: str
    """Output folder. Run the same command again to continue an interrupted run."""
    optimizer: str = "sgd"
    """Any timm optimiser (torch's fused version where there is one), or apex-fusedlamb, apex-fusedadam, apex-fusedsgd."""
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    clip_grad: float | None = None
    """Maximum gradient norm."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of what is trained; float32 on a CPU without instructions for it."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights (buffers included); it becomes the result."""
    channels_last: bool = False
    """Weights in channels-last memory format, as images are; meant for convolutions."""
    compile: bool = False
    """torch.compile of what is trained (its blocks one by one under fsdp) and of the teacher; minutes at the start."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl."""
    checkpoint_seconds: float = 30.0
    """Seconds between resume files; the end of an epoch writes one after a tenth of that."""
    tensorboard: bool = False
    """Also write TensorBoard events to OUT/tensorboard."""
    progress: bool = True
    """Progress bar (plain lines without a terminal)."""
    overwrite: bool = False
    """Throw away what is in OUT if it belongs to another config."""

    #: Settings that may differ when a run is continued: they do not change its result.
    FREE: ClassVar[frozenset[str]] = FREE_SETTINGS

    def _validate_run(self) -> None:
        self._positive("lr", "accumulate", "clip_grad", "log_every")
        self._not_negative("weight_decay", "min_lr", "warmup_lr", "checkpoint_seconds")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be a decay between 0 and 1 such as 0.9998, got {self.ema!r}")
        self._one_of("schedule", ("cosine", "step", "constant"))
        self._one_of("amp", ("none", "bf16", "fp16"))


@dataclass(kw_only=True)
class TrainConfig(RunConfig, _DataConfig):
    """Settings shared by ``distill`` and ``finetune`` on images."""

    student_size: int | None = None
    """The student's input size in pixels; default: the model's own."""
    student_pretrained: bool = False
    """Start the student from its pretrained weights."""
    student_options: dict[str, Any] = field(default_factory=dict)
    """Arguments for timm.create_model, such as drop_path_rate."""
    image_size: int | None = None
    """Size of the augmented view both models see; default: the larger input size, but not above the images' own."""
    epochs: int = 100
    augment: str = "imagenet-cnn"
    """Augmentation preset: none, small, cifar-cnn, cifar-vit, imagenet-cnn, imagenet-feature, imagenet-vit."""
    auto_augment: str | None = None
    """RandAugment string of timm such as rand-m9-mstd0.5-inc1; default: the preset's."""
    mixup: float | None = None
    """Mixup α; default: the preset's."""
    cutmix: float | None = None
    """CutMix α; default: the preset's."""
    random_erase: float | None = None
    """Random-erasing probability; default: the preset's."""
    aug_repeats: int = 1
    """Repeated augmentation: so many views of each image in a batch; an epoch stays as long and shows fewer images."""
    crop_pct: float = 1.0
    """Validation: part of the resized image that its centre crop keeps; 1.0 is all of it."""
    label_loss: Literal["ce", "bce"] = "ce"
    """With the labels: cross-entropy, or binary cross-entropy of each class, its mean over classes."""
    label_smoothing: float = 0.1
    warmup_epochs: int = 0
    decay_epochs: int = 30
    """Epochs between ×0.1 drops of the step schedule."""
    tail: Literal["drop", "exact"] = "drop"
    """Images left over by the last whole batch of an epoch: left out of this epoch ("drop"), or a smaller batch of their
    own, so that every image comes exactly once per epoch for any number of processes ("exact", see docs/scale.md)."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all processes instead of each its own (GPUs only; no effect in one process)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process holds the whole student ("ddp"), or a part of each weight, gradient and optimiser
    state ("fsdp", for students that do not fit on one GPU)."""
    overlap: bool = False
    """On a GPU: the teacher looks at the next batch on a CUDA stream of its own while the student trains. Changes no
    result; whether it pays has not been measured."""
    eval_every: int = 1
    """Epochs between validations; the last epoch is always validated."""

    def validate(self) -> None:
        """Checks every value before any work.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        self._validate_data()
        self._validate_run()
        self._positive("epochs", "eval_every", "student_size", "image_size", "decay_epochs", "aug_repeats")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")
        self._one_of("label_loss", ("ce", "bce"))
        if self.aug_repeats > 1 and self.tail == "exact":
            raise ValueError(
                f"tail='exact' shows every image once per epoch, aug_repeats={self.aug_repeats} some several times; choose one"
            )
        self._not_negative("warmup_epochs", "mixup", "cutmix")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing!r}")
        if self.random_erase is not None and not 0 <= self.random_erase <= 1:
            raise ValueError(f"random_erase must be a probability, got {self.random_erase!r}")
        self._one_of("tail", ("drop", "exact"))
        self._one_of("parallel", ("ddp", "fsdp"))
        if self.parallel == "fsdp" and self.amp == "fp16":
            raise ValueError("amp='fp16' cannot scale sharded gradients (parallel='fsdp'); use amp='bf16'")
        if self.parallel == "fsdp" and self.optimizer.lower().startswith(("apex-", "fused", "adafactor")):
            raise ValueError(
                f"optimizer={self.optimizer!r} cannot step on sharded weights (parallel='fsdp'); use parallel='ddp', or an "
                "optimizer such as adamw, lamb or sgd"
            )
        if self.parallel == "fsdp" and self.channels_last:
            raise ValueError(
                "channels_last=True needs whole weights, parallel='fsdp' shards them; use parallel='ddp', or leave "
                "channels_last out"
            )


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """A student learns from a frozen teacher."""

    teacher: str
    """timm name, NAME@/path/to/weights, code (net.py:Net), or a folder that distill or finetune wrote; several: --teacher A
    --teacher B (a list in Python and YAML)."""
    student: str
    """timm name, NAME@/path/to/weights, code (net.py:Net), or a folder that distill or finetune wrote."""
    more_teachers: tuple[str, ...] = ()
    """The second and further teachers, where `teacher` is one name."""
    teacher_weights: tuple[float, ...] = ()
    """Weight of each teacher, on top of those of the losses; default: equal ones that add up to 1."""
    loss: str = "rsd"
    """rsd, rsd-logits, kd, dkd, dist, ofa, mse, fitnet, rkd, crd, barlow-twins, or several joined by +, each with a weight of
    its own if wanted: dkd+rsd:0.05 (docs/losses.md)."""
    loss_options: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Options of losses as LOSS.OPTION VALUE, such as dkd.beta 8; they win over kappa, statistics and temperature."""
    loss_weight: float | None = None
    """λ before the distillation losses without one of their own; default: the method's (RSD 0.1, CRD 0.8, others 1)."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels; 0 trains without labels."""
    kappa: float = 0.01
    """RSD: weight of the off-diagonal part; 0 is invariance only."""
    statistics: Literal["local", "global"] = "local"
    """RSD under torchrun: batch statistics of each process ("local", the paper's), or of the whole batch on all of them."""
    temperature: float = 4.0
    """KD: softening of the probabilities."""
    aad_expansion: float = 2.0
    """AAD: hidden width in units of the student's; 0 is a single linear map (the "without AAD" ablation)."""
    taps: dict[str, str] = field(default_factory=dict)
    """Student's module → teacher's module, such as layer3 → blocks.17: the feature losses compare the mean over places of
    their outputs, too, each through a projector of its own, and fitnet their maps. With "logits" in the place of the teacher's
    module it is a stage of ofa. Of several teachers: 1:blocks.17,2:layers.3."""
    tap_weight: float = 1.0
    """Weight of the losses at taps, on top of their own."""
    teacher_size: int | None = None
    """The teacher's input size; default: its own (DINOv2: 224). Of several teachers the first one's (or a list)."""
    more_teacher_sizes: tuple[int, ...] = ()
    """Input sizes of `more_teachers`, 0 for a model's own; default: their own."""
    teacher_pretrained: bool = True
    teacher_options: dict[str, Any] = field(default_factory=dict)
    teacher_precision: Literal["float32", "bf16", "fp16"] = "float32"
    monitor: int = 1000
    """Where no loss trains the classifier: validation images on which agreement with the teacher (cosine, CKA) and k-NN
    are measured, before training and every `eval_every` epochs; 0: not at all."""
    cache: str = "none"
    """Teacher's outputs on disk: "none", "auto" (under $XDFAST_CACHE or ~/.cache/xdfast, shared by runs with the same
    teacher, images and views), or a folder. The first epochs fill it while they train; then the teacher is unloaded."""
    cache_views: int = 4
    """With a cache: K, so many fixed views of each image, taken in turns over the epochs."""
    cache_dtype: Literal["float16", "float32"] = "float16"
    """How the cache keeps values; float16 is exact to 0.05 %."""

    def validate(self) -> None:
        super().validate()
        self._not_negative("loss_weight", "ce_weight", "kappa", "aad_expansion", "monitor", "tap_weight")
        self._positive("temperature", "teacher_size")
        self._one_of("statistics", ("local", "global"))
        self._validate_losses()
        self._validate_teachers()
        self._positive("cache_views")
        if self.cache_dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype must be float16 or float32, got {self.cache_dtype!r}")
        if self.cache.strip() not in ("", "none") and self.aug_repeats > 1:
            raise ValueError(
                f"cache={self.cache!r} keeps fixed views, aug_repeats={self.aug_repeats} needs new ones; set one of them to its "
                "default"
            )
        if not self.cache.strip():
            raise ValueError("cache must be 'none', 'auto' or a folder, got an empty text")
        if self.teacher_precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f"teacher_precision must be float32, bf16 or fp16, got {self.teacher_precision!r}")

    def _validate_losses(self) -> None:
        from xdfast.losses import create_loss, loss_options, parse_losses

        names = parse_losses(self.loss)
        for key in self.loss_options:
            name, dot, option = key.partition(".")
            if not dot or name not in names:
                raise ValueError(
                    f"loss_options: {key!r} must be LOSS.OPTION of a loss in use ({', '.join(names)}).{nearest(name, names)}"
                )
            known = loss_options(name)
            if option not in known:
                raise ValueError(
                    f"loss_options: {name} has no option {option!r}; it has {', '.join(known)}.{nearest(option, known)}"
                )
        for name in names:
            create_loss(name, **self.options_of(name), **({"samples": 2} if name == "crd" else {}))

    def options_of(self, name: str) -> dict[str, Any]:
        """Constructor arguments of a loss, but for its weight and what the data tell."""
        options: dict[str, Any] = {}
        if name.startswith("rsd"):
            options = {"kappa": self.kappa, "statistics": self.statistics, "return_components": True}
        elif name == "kd":
            options = {"temperature": self.temperature}
        return options | {
            key.partition(".")[2]: value for key, value in self.loss_options.items() if key.partition(".")[0] == name
        }

    def _validate_teachers(self) -> None:
        count = 1 + len(self.more_teachers)
        if self.more_teacher_sizes and len(self.more_teacher_sizes) != count - 1:
            raise ValueError(
                f"more_teacher_sizes must name {count - 1} sizes, one each, got {self.more_teacher_sizes!r}"
            )
        if any(size < 0 for size in self.more_teacher_sizes):
            raise ValueError(f"more_teacher_sizes must be ≥ 0 (0: the model's own), got {self.more_teacher_sizes!r}")
        if self.teacher_weights and len(self.teacher_weights) != count:
            raise ValueError(
                f"teacher_weights must name {count} weights, one for each teacher, got {self.teacher_weights!r}"
            )
        if any(not 0 <= weight < float("inf") for weight in self.teacher_weights):
            raise ValueError(f"teacher_weights must be finite and ≥ 0, got {self.teacher_weights!r}")

    @classmethod
    def normalised(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A list of teachers (and of their sizes) as the first one and the others."""
        values = dict(values)
        for key, more in (("teacher", "more_teachers"), ("teacher_size", "more_teacher_sizes")):
            given = values.get(key)
            if not isinstance(given, (list, tuple)):
                continue
            if not given or values.get(more):
                raise ValueError(f"{key} must be one value or a list of some, without {more} beside it, got {given!r}")
            values[key] = given[0]
            values[more] = tuple(0 if x is None else x for x in given[1:])
        return values


@dataclass(kw_only=True)
class FinetuneConfig(TrainConfig):
    """Supervised training of one model: from scratch, or from a distilled student."""

    model: str
    """timm name, NAME@/path/to/weights, code (net.py:Net), or a folder that distill or finetune wrote."""
    freeze: Literal["none", "encoder"] = "none"
    """"encoder" trains the classifier alone (BatchNorm statistics stay)."""

    def validate(self) -> None:
        super().validate()
        if self.freeze not in ("none", "encoder"):
            raise ValueError(f"freeze must be 'none' or 'encoder', got {self.freeze!r}")


@dataclass(kw_only=True)
class EvaluateConfig(_DataConfig):
    """Accuracy of a model: top-1 and top-5, k-NN, linear probe, CKA to the teacher."""

    model: str
    """A run's folder, a timm name or NAME@/path/to/weights."""
    data: str | None = None  # type: ignore[assignment]
    """Images; default: those of the run."""
    teacher: str | None = None
    """Teacher for the CKA; default: that of the run."""
    out: str | None = None
    """Folder for evaluation.json; default: the run's."""
    knn: int = 20
    """Neighbours of the k-NN classifier; 0 leaves it out."""
    linear_probe: bool = True
    cka: bool = True
    probe_samples: int = 20_000
    """Most training images used by k-NN and linear probe (the first of a seeded shuffle)."""
    crop_pct: float | None = None
    """Part of the resized image that the centre crop keeps; default: that of the run, or all of it."""
    progress: bool = True

    def validate(self) -> None:
        """Checks every value; see :meth:`TrainConfig.validate`."""
        self._validate_data()
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")
        self._not_negative("knn")
        self._positive("probe_samples")


def save_yaml(path: Path, values: dict[str, Any]) -> None:
    """Writes settings as YAML."""
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
