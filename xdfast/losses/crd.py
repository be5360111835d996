"""CRD: contrastive representation distillation with a memory bank (arXiv 1910.10699)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from xdfast.losses._inputs import full_precision, in_full_precision, row_numbers
from xdfast.losses.base import DistillLoss, register_loss
from xdfast.ops._checks import check_choice, check_matrix, check_number, check_pair
from xdfast.ops._group import is_alone

__all__ = ["CRDLoss"]

_MOST_NEGATIVES = 16384  # the paper's N


@register_loss("crd")
class CRDLoss(DistillLoss):
    r"""Tells, for a sample's embedding, the other network's embedding of the same sample from those of other samples.

    .. math::
        L = -\frac{w}{B} \sum_{a \in \{s, t\}} \sum_n \Big[ \log h\big(g^{(a)}_n, m^{(\bar a)}_n\big)
            + \sum_{k=1}^{K} \log\big(1 - h(g^{(a)}_n, m^{(\bar a)}_{j_{nk}})\big) \Big], \quad
        h(g, m) = \frac{e^{g^\top m / \tau}}{e^{g^\top m / \tau} + Z K / M}

    g are embeddings on the unit sphere, m the other network's in a memory bank of all M training samples, K negatives j per
    sample and step. **Negatives come from the memory bank, not from the batch**: drawn anew in every step, uniformly and
    with replacement, from the samples of other classes where ``labels`` are given (the paper's choice with labels), else from
    all others. After a step in training mode the bank's rows of the batch move: m ← normalised(μ m + (1 − μ) g).

    Z is 1 in the paper's equation. Its public code estimates a constant from the first batch, M times the mean of
    e^{g·m/τ} over positives and negatives, one for each network; that is the default here.

    Its embeddings come from :class:`xdfast.nn.ContrastHeads`, one linear map on each side, both trained; ``distill`` makes
    them. Under torchrun every process holds the whole bank and all of them take over each other's rows, so a batch must hold
    equally many rows on each. Memory: 2 M · dim · 4 bytes for the bank, as much again in a step (a copy, since the bank
    changes before the gradient is taken) and 4 B M bytes for each side's scores.

    Args:
        samples: M, training samples; ids are in [0, M).
        dim: width of the embeddings.
        negatives: K; None: the paper's 16384, or M − 1 if that is less.
        temperature: τ > 0.
        momentum: μ in [0, 1).
        normaliser: ``"first-batch"`` or ``"none"`` (Z = 1).
        labels: int64 [M], class of each sample; None: every other sample may be a negative.
        weight: w ≥ 0.

    Shape:
        student, teacher: embeddings [B, dim], B ≥ 1, normalised here. ids: int64 [B]. Output: scalar; float32 for half
        inputs.

    Raises:
        ValueError, TypeError: shapes or devices differ, not [B, dim], not floating point; ids of another shape, no integers,
            out of range; fewer than two samples, labels of another length or of a single class; an option out of range.

    Reference:
        Tian et al., "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, equations 17 to 19 and section 3.4;
        weight 0.8 next to the cross-entropy as in its public code.

    Example:
        >>> import torch, xdfast
        >>> heads = xdfast.nn.ContrastHeads(64, 192)
        >>> criterion = xdfast.create_loss("crd", samples=50, negatives=16)
        >>> ids = torch.randperm(50)[:8]
        >>> criterion(*heads(torch.randn(8, 64), torch.randn(8, 192)), ids).backward()
    """

    default_weight = 0.8
    needs = ("ids",)
    projection = "contrast"
    at_taps = False

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    z_is_known: Tensor
    _order: Tensor
    _first: Tensor
    _count: Tensor

    def __init__(
        self,
        samples: int,
        dim: int = 128,
        negatives: int | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        normaliser: str = "first-batch",
        labels: Tensor | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        chosen = {"samples": (samples, 2), "dim": (dim, 1)} | (
            {} if negatives is None else {"negatives": (negatives, 1)}
        )
        for name, (value, least) in chosen.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}")
        self.samples, self.dim = samples, dim
        self.negatives = min(_MOST_NEGATIVES, samples - 1) if negatives is None else negatives
        self.temperature = check_number("temperature", temperature, minimum=0, strict=True)
        self.momentum = check_number("momentum", momentum, minimum=0)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1 (the bank would never change), got {momentum!r}")
        self.normaliser = check_choice("normaliser", normaliser, ("first-batch", "none"))
        bound = math.sqrt(3 / dim)  # unit length in the mean
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(samples, dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("z_is_known", torch.tensor(self.normaliser == "none"))
        self._group_by_class(labels)

    def _group_by_class(self, labels: Tensor | None) -> None:
        """Samples sorted by class, and where each sample's class begins in that order and how many it has."""
        group = torch.arange(self.samples) if labels is None else torch.as_tensor(labels).cpu()
        if group.shape != (self.samples,) or group.is_floating_point():
            raise ValueError(
                f"labels must be int64 [{self.samples}], a class for each sample, got {group.dtype} {list(group.shape)}"
            )
        _, group, count = group.unique(return_inverse=True, return_counts=True)
        if len(count) == 1:
            raise ValueError(
                f"all {self.samples} labels are the same class, so there is no sample of another one; use labels=None"
            )
        # Not in the state: they follow from the labels, and the resume file is large enough.
        self.register_buffer("_order", group.argsort(stable=True), persistent=False)
        self.register_buffer("_first", (count.cumsum(0) - count)[group], persistent=False)
        self.register_buffer("_count", count[group], persistent=False)

    def draw(self, ids: Tensor) -> Tensor:
        """int64 [B, K]: negatives of each sample, from torch's generator."""
        first, count = self._first[ids][:, None], self._count[ids][:, None]
        # uniform over the M − count samples of other classes: places in the order, with the own class skipped
        place = (
            torch.rand(len(ids), self.negatives, device=ids.device, dtype=torch.float64) * (self.samples - count)
        ).long()
        return self._order[place + (place >= first) * count]

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        check_matrix("student", student)
        check_matrix("teacher", teacher)
        check_pair("student", student, "teacher", teacher, fix=f"embed both in {self.dim} dimensions (ContrastHeads)")
        if student.shape[1] != self.dim:
            raise ValueError(
                f"embeddings must have shape [B, {self.dim}], got {list(student.shape)}; pass dim={student.shape[1]}"
            )
        ids = row_numbers("ids", ids, student, self.samples, "a position in the training set")
        chosen = torch.cat((ids[:, None], self.draw(ids)), 1)  # [B, 1 + K]
        with in_full_precision(student):
            g_s, g_t = (F.normalize(full_precision(x), dim=1) for x in (student, teacher))
            # A copy: the bank changes below, before the gradient is taken. Scores of the whole bank, since gathering rows
            # [B, K, dim] first would move dim times as much.
            scores = torch.stack(
                [
                    (g @ bank.to(g.dtype, copy=True).T).gather(1, chosen)
                    for g, bank in ((g_s, self.teacher_bank), (g_t, self.student_bank))
                ]
            ) / self.temperature  # fmt: skip
            if self.normaliser == "first-batch":
                self._estimate_z(scores.detach())
            odds = scores - self.log_z.to(scores.dtype)[:, None, None] - math.log(self.negatives / self.samples)
            # log h = logsigmoid(odds) and log(1 − h) = logsigmoid(−odds)
            loss = -(F.logsigmoid(odds[..., 0]) + F.logsigmoid(-odds[..., 1:]).sum(-1)).mean(1).sum()
        if self.training:
            self._move(ids, g_s.detach(), g_t.detach())
        return loss * self.weight

    @torch.no_grad()
    def _estimate_z(self, scores: Tensor) -> None:
        """Sets Z, once; without asking the device whether it is set."""
        log_mean = scores.flatten(1).logsumexp(1) - math.log(scores[0].numel())
        if not is_alone(""):
            mean = log_mean.exp()
            dist.all_reduce(mean)
            log_mean = (mean / dist.get_world_size()).log()
        estimate = (log_mean + math.log(self.samples)).to(self.log_z)
        self.log_z.copy_(torch.where(self.z_is_known, self.log_z, estimate))
        self.z_is_known.fill_(True)

    @torch.no_grad()
    def _move(self, ids: Tensor, g_s: Tensor, g_t: Tensor) -> None:
        """The bank's rows of this batch, on all ranks."""
        if not is_alone(""):
            ids, g_s, g_t = (_gathered(x) for x in (ids, g_s, g_t))
        for bank, g in ((self.student_bank, g_s), (self.teacher_bank, g_t)):
            moved = self.momentum * bank[ids] + (1 - self.momentum) * g.to(bank.dtype)
            bank.index_copy_(0, ids, F.normalize(moved, dim=1))

    def extra_repr(self) -> str:
        return (
            f"samples={self.samples}, dim={self.dim}, negatives={self.negatives}, temperature={self.temperature:g}, "
            f"momentum={self.momentum:g}, normaliser={self.normaliser!r}, weight={self.weight:g}"
        )


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks, which hold equally many."""
    rows = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows
