"""What each distillation loss compares: its terms, and the projectors that they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xdfast.losses import CRDLoss, DistillLoss
from xdfast.models import FeatureModel, pool_tap
from xdfast.nn import AAD, ContrastHeads, HintRegressor, OFAProjector, map_side
from xdfast.pipeline.config import DistillConfig

__all__ = [
    "LOGITS",
    "Term",
    "grid_of",
    "make_projector",
    "map_kind",
    "prefix_tokens",
    "tap_examples",
    "tap_key",
    "taps_of",
    "terms_of",
    "waits_for_ranks",
]

#: In ``taps``, in the place of a teacher's module: compare this module of the student with the teacher's logits.
LOGITS = "logits"

_OFA_DOWN = 32  # input pixels per place of the last stage, 7 of 224


@dataclass(frozen=True)
class Term:
    """One value of a loss: what of the student, through ``projectors[key]`` if there is one, against what of the teacher.

    Attributes:
        key: its name in metrics and among the projectors.
        loss: name of the loss in the task.
        student: the penultimate features, the logits, a tap's mean over places, or a tap as the module gives it.
        tap: the student's module, for the last two.
        teacher: kind of output, as :class:`xdfast.pipeline.teacher.LiveTeacher` names it, with ``N:`` before it for the
            second and further teachers.
        weight: on top of the loss's own.
    """

    key: str
    loss: str
    student: Literal["features", "logits", "pooled", "tap"]
    teacher: str
    tap: str = ""
    weight: float = 1.0


def tap_key(loss: str, tap: str) -> str:
    """Name of a loss's term at a student's tap, ``"mse_at_layer3"``; a module's name may not hold dots."""
    return f"{loss}_at_{tap.replace('.', '_')}"


def map_kind(grid: int, tap: str) -> str:
    """The teacher's output that is a module's map averaged to ``grid`` places per side, flattened."""
    return f"map{grid}:{tap}"


def terms_of(
    losses: Mapping[str, DistillLoss],
    taps: Mapping[str, str],
    tap_weight: float = 1.0,
    *,
    number: int | None = None,
    weight: float = 1.0,
    grids: Mapping[tuple[str, str], int] | None = None,
) -> list[Term]:
    """The terms of losses towards one teacher.

    Args:
        losses: by name.
        taps: student's module → teacher's module, or :data:`LOGITS`.
        tap_weight: of terms at taps.
        number: of the teacher, from 1, where there are several; it then ends the names (``"rsd_t2"``).
        weight: of this teacher.
        grids: (loss, student's tap) → places per side, for losses on maps.

    Returns:
        Terms on features and logits first, those at taps after them.
    """
    end = "" if number is None else f"_t{number}"
    of = "" if number in (None, 1) else f"{number}:"
    modules = {mine: theirs for mine, theirs in taps.items() if theirs != LOGITS}
    stages = [mine for mine, theirs in taps.items() if theirs == LOGITS]
    whole, at_taps = [], []
    for name, loss in losses.items():
        key = name + end
        if loss.on == "features":
            whole.append(Term(key, key, "features", f"{of}features", "", weight))
        if loss.on == "logits":
            whole.append(Term(key, key, "logits", f"{of}logits", "", weight))
        if loss.on == "features" and loss.at_taps:
            at_taps += [
                Term(tap_key(name, mine) + end, key, "pooled", f"{of}tap:{theirs}", mine, weight * tap_weight)
                for mine, theirs in modules.items()
            ]
        if loss.on == "maps" and grids is not None:
            at_taps += [
                Term(tap_key(name, mine) + end, key, "tap", of + map_kind(grids[name, mine], theirs), mine, weight * tap_weight)
                for mine, theirs in modules.items()
            ]  # fmt: skip
        if loss.at_stages:
            at_taps += [
                Term(tap_key(name, mine) + end, key, "tap", f"{of}logits", mine, weight * tap_weight) for mine in stages
            ]
    return whole + at_taps


def taps_of(config: DistillConfig) -> list[dict[str, str]]:
    """Taps towards each teacher. With several, ``"1:blocks.17,2:layers.3"`` names modules of the first and the second.

    Raises:
        ValueError: a module without a teacher's number among several teachers, or the number of none.
    """
    count = 1 + len(config.more_teachers)
    if count == 1:
        return [dict(config.taps)]
    found: list[dict[str, str]] = [{} for _ in range(count)]
    for mine, text in config.taps.items():
        for part in text.split(","):
            if part.strip() == LOGITS:
                for taps in found:
                    taps[mine] = LOGITS
                continue
            number, colon, module = part.strip().partition(":")
            if not colon or not number.isdigit() or not 1 <= int(number) <= count:
                raise ValueError(
                    f"taps: with {count} teachers {mine} needs a teacher's number before each module, such as "
                    f"'1:blocks.17,2:layers.3' (or 'logits', for all of them), got {text!r}"
                )
            found[int(number) - 1][mine] = module
    return found


@torch.no_grad()
def tap_examples(model: FeatureModel) -> dict[str, Tensor]:
    """Tap → what the module gives for one black image; the model is left in the mode it was in."""
    if not model.taps:
        return {}
    was_training = model.training
    model.eval()
    try:
        device = next(model.net.parameters()).device
        return model(torch.zeros(1, 3, model.image_size, model.image_size, device=device)).taps
    finally:
        model.train(was_training)


def prefix_tokens(model: FeatureModel) -> int:
    """Class and register tokens of a vision transformer, which come before those of the patches."""
    return int(getattr(model.net, "num_prefix_tokens", 0) or 0)


def grid_of(loss: Any, mine: Tensor, theirs: Tensor, student: FeatureModel, teacher: FeatureModel) -> int:
    """Places per side at which a loss on maps compares two taps: the coarser one's, or the loss's own ``grid`` if coarser."""
    sides = [map_side(mine, prefix_tokens(student)), map_side(theirs, prefix_tokens(teacher))]
    chosen = getattr(loss, "grid", None)
    return min(sides if chosen is None else [*sides, chosen])


def make_projector(
    term: Term,
    loss: DistillLoss,
    student: FeatureModel,
    teacher: FeatureModel,
    examples: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    stages: Iterable[str],
    *,
    aad_expansion: float,
) -> nn.Module | None:
    """What stands before a term; None for nothing.

    Args:
        term, loss: see :func:`terms_of`.
        student, teacher: the models.
        examples: of the student's and of the teacher's taps, see :func:`tap_examples`.
        stages: the student's taps that are compared with logits, in order.
        aad_expansion: of :class:`xdfast.AAD`.
    """
    if term.student == "logits" or (loss.on == "features" and loss.projection == "none"):
        return None
    mine, theirs = examples
    module = term.teacher.rpartition(":")[2]
    if loss.projection == "contrast":
        dim = loss.dim if isinstance(loss, CRDLoss) else 128
        return ContrastHeads(student.num_features, teacher.num_features, dim)
    if term.student == "features":
        return AAD(student.num_features, teacher.num_features, aad_expansion)
    if term.student == "pooled":
        widths = [pool_tap(x, term.tap).shape[1] for x in (mine[term.tap], theirs[module])]
        return AAD(widths[0], widths[1], aad_expansion)
    if loss.on == "maps":
        widths = [pool_tap(x, term.tap).shape[1] for x in (mine[term.tap], theirs[module])]
        return HintRegressor(widths[0], widths[1], grid_in(term.teacher), prefix_tokens(student))
    order = list(stages)
    return OFAProjector(
        mine[term.tap].shape[1:],
        student.num_classes,
        student.num_features,
        teacher.num_features,
        blocks=max(len(order) - 1 - order.index(term.tap), 1),  # the paper's 3, 2, 1, 1 at four stages
        prefix_tokens=prefix_tokens(student),
        final_side=max(student.image_size // _OFA_DOWN, 1),
    )


def grid_in(kind: str) -> int:
    """The grid in a :func:`map_kind`, with or without a teacher's number."""
    parts = kind.split(":")
    return int((parts[0] if kind.startswith("map") else parts[1]).removeprefix("map"))


def waits_for_ranks(loss: DistillLoss) -> bool:
    """Whether a loss exchanges rows or statistics, so that every rank has to bring equally many rows in every step."""
    return (
        isinstance(loss, CRDLoss)
        or getattr(loss, "statistics", "local") == "global"
        or bool(getattr(loss, "gather_distributed", False))
    )
