"""What is trained, apart from how: a module that maps a batch to named loss terms.

The loop wraps it in DistributedDataParallel as a whole, so the projector's gradients are averaged like the student's;
the teacher stays outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.data import Batch
from xdfast.losses import DistillLoss
from xdfast.models import pool_tap
from xdfast.ops.rsd import RSDComponents
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher

__all__ = ["DistillTask", "SupervisedTask", "TrainingTask", "millions", "tap_key"]


class TrainingTask(nn.Module):
    """Base: holds the student; ``forward`` returns ``{"loss": scalar with gradient, name: detached term, …}``.

    A rank that has no rows in a step still has to take part in the exchange of gradients. It calls ``forward`` with
    ``targets=None`` and any images, in eval mode (BatchNorm statistics are not touched), and gets a loss of zero that
    depends on every trainable weight.
    """

    def __init__(self, student: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing

    #: What is counted per second, for the progress bar.
    unit = "img"

    def inputs(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """(images, targets) of a batch on the device, as :meth:`forward` takes them; images as float in [0, 1]."""
        images = batch.images.to(device, non_blocking=True).float().div_(255)
        return images, batch.labels.to(device, non_blocking=True)

    def parameter_groups(self, config: Any) -> list[dict[str, Any]] | None:
        """Groups of trainable parameters with rates of their own, as torch's optimisers take them; None: all alike."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Called on every rank before the first batch of an epoch."""

    def teach(self, images: Tensor, batch: Any) -> dict[str, Any]:
        """Arguments of :meth:`forward` from outside the trained module, tensors without gradient; none by default.

        Args:
            images: as :meth:`inputs` gave them, augmented.
            batch: which samples and views they are.
        """
        return {}

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)


class SupervisedTask(TrainingTask):
    """Cross-entropy with the labels. targets: int64 [B], or probabilities [B, C] after mixup."""

    def __init__(self, student: nn.Module, label_smoothing: float = 0.0, freeze_encoder: bool = False) -> None:
        super().__init__(student, label_smoothing)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            head = {id(p) for p in _classifier(student).parameters()}
            for parameter in student.parameters():
                parameter.requires_grad_(id(parameter) in head)

    def train(self, mode: bool = True) -> SupervisedTask:
        super().train(mode)
        if self.freeze_encoder:  # batch statistics of a frozen encoder must not drift
            self.student.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        if targets is None:
            return _nothing(self.student(images).logits)
        loss = self._cross_entropy(self.student(images).logits, targets)
        return {"loss": loss, "ce": loss.detach()}


class DistillTask(TrainingTask):
    """ce_weight · CE + Σ losses(student, teacher).

    Feature losses see ``projectors[name](student features)`` against the teacher's penultimate features; logit losses
    the two logits. With taps, feature losses also see the mean over places of one module's output in each, through a
    projector of their own. The teacher is no sub-module: not trained, not saved, not wrapped.

    Args:
        student, teacher: what learns, and what it is told.
        losses: by name.
        projectors: of each feature loss, by its name and by ``tap_key(name, student tap)``.
        ce_weight, label_smoothing: of the cross-entropy.
        taps: student's module → teacher's module; both models have these taps.
        tap_weight: of a feature loss at a tap, on top of its own weight.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: LiveTeacher | CachedTeacher,
        losses: dict[str, DistillLoss],
        projectors: dict[str, nn.Module],
        *,
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        taps: dict[str, str] | None = None,
        tap_weight: float = 1.0,
    ) -> None:
        super().__init__(student, label_smoothing)
        self.taps, self.tap_weight = dict(taps or {}), tap_weight
        self.losses = nn.ModuleDict(losses)
        self.projectors = nn.ModuleDict(projectors)
        self.ce_weight = ce_weight
        self.teacher = teacher
        if not self.uses_logits:  # a head without a gradient would stall DistributedDataParallel
            for parameter in _classifier(student, missing_ok=True).parameters():
                parameter.requires_grad_(False)

    @property
    def uses_logits(self) -> bool:
        """Whether any term reads the student's logits."""
        return self.ce_weight > 0 or any(loss.on == "logits" for loss in self.losses.values())

    def begin_epoch(self, epoch: int) -> None:
        self.teacher.begin_epoch(epoch)

    def teach(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {f"teacher_{kind}": value for kind, value in self.teacher.targets(images, batch).items()}

    def forward(
        self,
        images: Tensor,  # [B, 3, S, S]
        targets: Tensor | None,  # [B] or [B, C]; None: no rows here
        teacher_features: Tensor | None = None,  # [B, D]
        teacher_logits: Tensor | None = None,  # [B, C]
        **teacher_taps: Tensor,  # "teacher_tap:MODULE" [B, D]
    ) -> dict[str, Tensor]:
        output = self.student(images)
        inside = {tap: pool_tap(output.taps[tap], tap) for tap in self.taps}
        if targets is None:
            sources = {tap_key(name, tap): value for name in self.losses for tap, value in inside.items()}
            projected = [projector(sources.get(name, output.features)) for name, projector in self.projectors.items()]
            return _nothing(*projected, *([output.logits] if self.uses_logits else []))
        total: Any = 0.0
        terms: dict[str, Tensor] = {}
        if self.ce_weight > 0:
            ce = self._cross_entropy(output.logits, targets)
            terms["ce"] = ce.detach()
            total = total + self.ce_weight * ce
        for name, loss in self.losses.items():
            if loss.on == "features":
                value = loss(self.projectors[name](output.features), teacher_features)
            else:
                value = loss(output.logits, teacher_logits)
            if isinstance(value, RSDComponents):
                terms[f"{name}_diagonal"] = value.mean_diagonal.detach()
                value = value.loss
            terms[name] = value.detach()
            total = total + value
            for tap, theirs in self.taps.items() if loss.on == "features" else ():
                key = tap_key(name, tap)
                value = loss(self.projectors[key](inside[tap]), teacher_taps[f"teacher_tap:{theirs}"])
                value = (value.loss if isinstance(value, RSDComponents) else value) * self.tap_weight
                terms[key] = value.detach()
                total = total + value
        return {"loss": total, **terms}


def tap_key(loss: str, tap: str) -> str:
    """Name of a loss's projector at a student's tap, ``"mse_at_layer3"``; a module's name may not hold dots."""
    return f"{loss}_at_{tap.replace('.', '_')}"


def _nothing(*outputs: Tensor) -> dict[str, Tensor]:
    return {"loss": torch.stack([(output.float() * 0).sum() for output in outputs]).sum()}


def _classifier(student: nn.Module, missing_ok: bool = False) -> nn.Module:
    classifier = getattr(student, "classifier", None)
    if isinstance(classifier, nn.Module):
        return classifier
    if missing_ok:
        return nn.Identity()
    raise ValueError("the model has no classifier to train; give it one with num_classes, or do not freeze the encoder")


def millions(module: nn.Module) -> float:
    """Parameters of a module, in 10⁶."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def seed_everything(seed: int, *numbers: int) -> None:
    """Seeds torch from (seed, numbers): dropout of one step is a function of the step, so a resumed run repeats it."""
    mixed = seed
    for number in numbers:
        # splitmix64: neighbouring numbers give unrelated seeds
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
