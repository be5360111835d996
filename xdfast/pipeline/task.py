"""What is trained, apart from how: a module that maps a batch to named loss terms.

The loop wraps it in DistributedDataParallel as a whole, so the projector's gradients are averaged like the student's;
the teacher stays outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.data import Batch
from xdfast.losses import DistillLoss
from xdfast.models import pool_tap
from xdfast.nn import ContrastHeads
from xdfast.ops.rsd import RSDComponents
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher
from xdfast.pipeline.teachers import Teachers
from xdfast.pipeline.terms import Term, terms_of

__all__ = ["DistillTask", "SupervisedTask", "TrainingTask", "millions"]


class TrainingTask(nn.Module):
    """Base: holds the student; ``forward`` returns ``{"loss": scalar with gradient, name: detached term, …}``.

    A rank that has no rows in a step still has to take part in the exchange of gradients. It calls ``forward`` with
    ``targets=None`` and any images, in eval mode (BatchNorm statistics are not touched), and gets a loss of zero that
    depends on every trainable weight.
    """

    def __init__(self, student: nn.Module, label_smoothing: float = 0.0, label_loss: str = "ce") -> None:
        super().__init__()
        self.student = student
        self.label_smoothing, self.label_loss = label_smoothing, label_loss

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

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy with the labels; or ("bce") the mean over samples and classes of each class's binary one, with
        targets y (1 − ε) + ε / C as in timm ("ResNet strikes back", arXiv 2110.00476)."""
        if self.label_loss == "ce":
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        classes = logits.shape[1]
        wanted = targets if targets.dim() == 2 else F.one_hot(targets, classes)
        wanted = wanted.float() * (1 - self.label_smoothing) + self.label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits.float(), wanted)


class SupervisedTask(TrainingTask):
    """Cross-entropy with the labels. targets: int64 [B], or probabilities [B, C] after mixup."""

    def __init__(
        self, student: nn.Module, label_smoothing: float = 0.0, label_loss: str = "ce", freeze_encoder: bool = False
    ) -> None:
        super().__init__(student, label_smoothing, label_loss)
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
        loss = self._label_loss(self.student(images).logits, targets)
        return {"loss": loss, self.label_loss: loss.detach()}


class DistillTask(TrainingTask):
    """ce_weight · CE + Σ weight · loss(projector(student), teacher) over terms.

    The teacher is no sub-module: not trained, not saved, not wrapped.

    Args:
        student, teacher: what learns, and what it is told.
        losses: by name.
        projectors: of the terms that need one, by the term's key.
        ce_weight, label_smoothing, label_loss: of the loss with the labels, CE or binary CE.
        terms: what is compared; default: the features or logits of each loss, see :func:`xdfast.pipeline.terms.terms_of`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: LiveTeacher | CachedTeacher | Teachers,
        losses: dict[str, DistillLoss],
        projectors: dict[str, nn.Module],
        *,
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        label_loss: str = "ce",
        terms: Sequence[Term] | None = None,
    ) -> None:
        super().__init__(student, label_smoothing, label_loss)
        self.terms = tuple(terms_of(losses, {}) if terms is None else terms)
        self.losses = nn.ModuleDict(losses)
        self.projectors = nn.ModuleDict(projectors)
        self.ce_weight = ce_weight
        self.teacher = teacher
        if not self.uses_logits:  # a head without a gradient would stall DistributedDataParallel
            for parameter in _classifier(student, missing_ok=True).parameters():
                parameter.requires_grad_(False)
        # Memory banks: equal on all ranks by their own exchange, and far too large to be broadcast in every step.
        self._ddp_params_and_buffers_to_ignore = [
            f"losses.{name}" for name, buffer in self.losses.named_buffers() if buffer.numel() > 0
        ]

    @property
    def uses_logits(self) -> bool:
        """Whether any term reads the student's logits."""
        return self.ce_weight > 0 or any(loss.on == "logits" for loss in self._each_loss())

    def begin_epoch(self, epoch: int) -> None:
        self.teacher.begin_epoch(epoch)

    def teach(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        taught = {f"teacher_{kind}": value for kind, value in self.teacher.targets(images, batch).items()}
        if any("ids" in loss.needs for loss in self._each_loss()):
            taught["ids"] = batch.ids.to(images.device, non_blocking=True)
        return taught

    def forward(
        self,
        images: Tensor,  # [B, 3, S, S]
        targets: Tensor | None,  # [B] or [B, C]; None: no rows here
        ids: Tensor | None = None,  # [B] positions in the training set
        **taught: Tensor,  # "teacher_KIND" [B, …]
    ) -> dict[str, Tensor]:
        output = self.student(images)
        if targets is None:
            projected = [self._compared(term, output, None)[0] for term in self.terms if term.key in self.projectors]
            return _nothing(*projected, *([output.logits] if self.uses_logits else []))
        total: Any = 0.0
        values: dict[str, Tensor] = {}
        if self.ce_weight > 0:
            ce = self._label_loss(output.logits, targets)
            values[self.label_loss] = ce.detach()
            total = total + self.ce_weight * ce
        needed = {"targets": targets, "ids": ids}
        for term in self.terms:
            loss: Any = self.losses[term.loss]
            value = loss(
                *self._compared(term, output, taught[f"teacher_{term.teacher}"]), *(needed[x] for x in loss.needs)
            )
            if isinstance(value, RSDComponents):
                if not term.tap:
                    values[f"{term.key}_diagonal"] = value.mean_diagonal.detach()
                value = value.loss
            value = value * term.weight
            values[term.key] = value.detach()
            total = total + value
        return {"loss": total, **values}

    def _compared(self, term: Term, output: Any, theirs: Tensor | None) -> tuple[Tensor, Any]:
        """The student's and the teacher's side of a term, as its loss takes them; ``theirs`` is None without rows."""
        if term.tap:
            mine = pool_tap(output.taps[term.tap], term.tap) if term.student == "pooled" else output.taps[term.tap]
        else:
            mine = getattr(output, term.student)
        if term.key not in self.projectors:
            return mine, theirs
        projector: Any = self.projectors[term.key]
        if isinstance(projector, ContrastHeads):
            if theirs is None:
                both = projector(mine, mine.new_zeros(len(mine), projector.teacher_features))
                return torch.cat(both, 1), None  # both heads take part
            return projector(mine, theirs)
        mine = projector(mine)
        return (mine.flatten(1) if mine.ndim == 4 else mine), theirs

    def _each_loss(self) -> list[Any]:
        return list(self.losses.values())


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
