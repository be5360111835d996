"""``distill``: a student learns from a frozen teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdfast import distributed
from xdfast.data import ImageLoader
from xdfast.losses import DistillLoss, create_loss, parse_losses
from xdfast.models import FeatureModel, create_model, weights_hash
from xdfast.nn import AAD
from xdfast.pipeline.actdistill_config import ActDistillConfig
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.data import Images, eval_loader, open_images, train_loader, view_size
from xdfast.pipeline.folder import RunResult, model_source, open_folder
from xdfast.pipeline.monitor import Monitor, sample
from xdfast.pipeline.parallel import prepare_teacher
from xdfast.pipeline.precision import computed_precision
from xdfast.pipeline.task import DistillTask, seed_everything
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher, open_store
from xdfast.pipeline.teachers import Teachers
from xdfast.pipeline.terms import (
    LOGITS,
    Term,
    grid_of,
    make_projector,
    tap_examples,
    taps_of,
    terms_of,
    waits_for_ranks,
)
from xdfast.pipeline.train_run import make_student, run_training, settings_of

__all__ = ["distill"]

log = logging.getLogger("xdfast")


def distill(
    config: DistillConfig | ActDistillConfig | None = None,
    *,
    teacher: str | nn.Module | RunResult | list[str | nn.Module | RunResult] | None = None,
    student: str | nn.Module | RunResult | None = None,
    data: Any = None,
    val_data: Any = None,
    **settings: Any,
) -> RunResult:
    """Trains ``student`` on ``data`` to imitate ``teacher``: L = ce_weight · CE + λ · L_distill.

    Several losses are joined by ``+`` (``loss="dkd+rsd:0.05"``, docs/losses.md). With a list of teachers, each looks at the
    view at its own size with its own mean and std and has projectors of its own; the losses towards them are weighted by
    ``teacher_weights``.

    Each model sees the same augmented view, resized to its own input size and normalised with its own mean and std.
    The student is saved as safetensors that plain timm loads; the projector stays in the resume file. Killed at any
    moment, the same call continues and ends with the same weights. Under ``torchrun`` it is data-parallel; the
    distillation loss and its statistics are per process.

    With ``cache="auto"`` every image has ``cache_views`` fixed views; the first epochs keep what the teacher says of them
    on disk, the others read it, without the teacher. The store belongs to these weights, images and views, and to nothing
    else; the next run that fits it finds it filled.

    With ``target_flops``, the teacher is a vision-language-action model and the student its copy that skips layers, chosen anew
    for every decision (ActDistill; settings: :class:`ActDistillConfig`)::

        student = xd.distill(teacher="runs/vla", target_flops=0.5, out="runs/vla-half")

    Args:
        config: all settings; or give them as keyword arguments, see :class:`DistillConfig`.
        teacher, student: timm name, ``NAME@/path/weights``, folder of a run, an ``nn.Module``, or a finished run; of teachers
            also a list.
        data, val_data: path or name as in :class:`DistillConfig`, or a torch dataset of (image, label).
        settings: fields of :class:`DistillConfig`, such as ``loss="rsd"``, ``epochs=100``, ``out="runs/x"``.

    Returns:
        :class:`RunResult` with ``.student``, ``.metrics``, ``.path``.

    Raises:
        ValueError: a bad setting, models that do not fit the loss, or an ``out`` folder of another config.
        RuntimeError: the loss is not finite, or the resume file belongs to other data or another teacher.

    Reference:
        RSD: arXiv 2507.21844; X-Distill stage 1: arXiv 2601.11269; ActDistill: arXiv 2511.18082.

    Example:
        >>> run = xdfast.distill(teacher="runs/teacher", student="resnet18", data="sklearn:digits",
        ...                      student_size=32, epochs=10, out="runs/rsd")  # doctest: +SKIP
    """
    if isinstance(config, ActDistillConfig) or "target_flops" in settings:
        return _distill_vla(config, teacher, {"student": student, "data": data, "val_data": val_data}, settings)
    settled: DistillConfig = settings_of(
        DistillConfig, config, {"teacher": teacher, "student": student}, {"data": data, "val_data": val_data}, settings
    )
    settled.validate()
    distributed.init()
    out, finished = open_folder(settled, "distill")
    if finished is not None:
        log.info("%s is finished; returning its result", out)
        return finished

    parts = prepare(settled, teacher=teacher, student=student, data=data, val_data=val_data)
    try:
        return run_training(
            "distill", parts.task, parts.images, parts.loader, parts.batch_augment, settled, out, parts.identity,
            parts.monitor,
        )  # fmt: skip
    finally:
        parts.task.teacher.close()


def _distill_vla(config: Any, teacher: Any, others: dict[str, Any], settings: dict[str, Any]) -> RunResult:
    superfluous = [name for name, value in others.items() if value is not None]
    if superfluous:
        raise ValueError(
            f"the student of a VLA is made of its teacher and learns from demos=…; leave out {', '.join(superfluous)}"
        )
    if "demos" in settings:
        settings = {**settings, "demos": str(settings["demos"])}
    config = settings_of(ActDistillConfig, config, {"teacher": teacher}, {}, settings)
    from xdfast.pipeline.actdistill import distill_vla  # needs the robot extra

    return distill_vla(config, teacher)


@dataclass
class Prepared:
    """What a distillation needs before its first step."""

    task: DistillTask
    images: Images
    loader: ImageLoader
    batch_augment: Any | None
    identity: dict[str, Any]
    monitor: Monitor | None


def prepare(
    config: DistillConfig, *, teacher: Any, student: Any, data: Any, val_data: Any, monitored: bool = True
) -> Prepared:
    """Opens images, models and the teacher cache; arguments other than ``config`` as for :func:`distill`.

    ``monitored=False`` leaves out the monitor, for those who will not train.
    """
    images = open_images(config, data, val_data)
    classes = len(images.train.classes)

    precision, dtype = computed_precision(config.teacher_precision, distributed.device_for_rank(config.device))

    def load_teacher(number: int) -> FeatureModel:
        # a teacher without pretrained weights must be the same on every rank
        seed_everything(config.seed, 3, *([number] if number else []))
        net = create_model(
            model_source(sources[number]),
            pretrained=config.teacher_pretrained,
            image_size=sizes[number] or None,
            frozen=True,
            dtype=dtype,
            device=distributed.device_for_rank(config.device),
            options=config.teacher_options,
            taps=tuple(theirs for theirs in dict.fromkeys(taps[number].values()) if theirs != LOGITS),
        )
        return prepare_teacher(net, config)

    taps = taps_of(config)
    sources = _sources(config, teacher)
    sizes = (config.teacher_size, *(config.more_teacher_sizes or [None] * len(config.more_teachers)))
    nets = [load_teacher(number) for number in range(len(sources))]
    student_net = make_student(config.student if student is None else student, config, classes)
    task = build_task(config, student_net, nets, classes, images.train.labels)
    size = view_size(config, images.train, [student_net, *nets])
    loader, batch_augment = train_loader(config, images.train, size, student_net)
    hashes = [weights_hash(net) for net in nets]
    identity: dict[str, Any] = {"teacher": hashes[0] if len(hashes) == 1 else hashes}
    monitor = None
    if monitored and config.monitor and not task.uses_logits:
        device = distributed.device_for_rank(config.device)
        task.to(device)
        val, train = (
            eval_loader(
                sample(source, config.monitor), size, batch_size=config.batch_size, workers=config.workers,
                decoder=config.decoder, sharded=False, crop_pct=config.crop_pct,
            )
            for source in (images.val, images.train)
        )  # fmt: skip
        through = {key: module for key, module in task.projectors.items() if key in _looked_through(task)}
        monitor = Monitor(val, train, nn.ModuleDict(through), nets[0], device)
    if config.cache != "none":
        lives = task.teacher.members if isinstance(task.teacher, Teachers) else (task.teacher,)
        members = []
        for number, (net, live) in enumerate(zip(nets, lives, strict=True)):
            store = open_store(
                _store_folder(config.cache, number, len(nets)), net, hashes[number], images.train, loader, live.kinds,
                views=config.cache_views, dtype=config.cache_dtype, precision=precision, amp=config.amp,
            )  # fmt: skip
            load, first = partial(load_teacher, number), None if store.complete else net
            members.append(CachedTeacher(store, load, loader, live.kinds, net=first, progress=config.progress))
        task.teacher = members[0] if len(members) == 1 else Teachers(members, loader)
    return Prepared(task, images, loader, batch_augment, identity, monitor)


def _sources(config: DistillConfig, teacher: Any) -> list[Any]:
    """What each teacher is made from: the objects given, else the specs of the config."""
    specs = [config.teacher, *config.more_teachers]
    if teacher is None:
        return specs
    given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    return given + specs[len(given) :]


def _store_folder(cache: str, number: int, teachers: int) -> str:
    """Each of several teachers has a store of its own in a folder that is named."""
    return cache if cache == "auto" or teachers == 1 else str(Path(cache) / f"teacher-{number + 1}")


def _looked_through(task: DistillTask) -> set[str]:
    """Projectors from the student's features to those of the first teacher."""
    return {
        term.key
        for term in task.terms
        if (term.student, term.teacher) == ("features", "features")
        and term.key in task.projectors
        and isinstance(task.projectors[term.key], AAD)
    }


def build_task(
    config: DistillConfig,
    student: FeatureModel,
    teacher: FeatureModel | Sequence[FeatureModel],
    classes: int,
    labels: Any = None,
) -> DistillTask:
    """The losses and projectors of a config around a student and its teachers.

    Args:
        config: the settings.
        student, teacher: models with the taps that the config names.
        classes: of the data.
        labels: of the training images ``[N]``, for losses that remember samples.

    Raises:
        ValueError: a logit loss and a teacher whose classes are not the data's; taps that no loss compares, or a loss that
            needs some and gets none; a loss over ranks with exact tails.
    """
    nets = [teacher] if isinstance(teacher, FeatureModel) else list(teacher)
    weights = config.teacher_weights or [1 / len(nets)] * len(nets)
    ours = tap_examples(student)
    losses: dict[str, DistillLoss] = {}
    projectors: dict[str, nn.Module] = {}
    terms: list[Term] = []
    lives = []
    for number, (net, taps, weight) in enumerate(zip(nets, taps_of(config), weights, strict=True), 1):
        theirs = tap_examples(net)
        made = _make_losses(config, net, classes, labels, number)
        check_taps(config, made, taps)
        grids = {
            (name, mine): grid_of(loss, ours[mine], theirs[his], student, net)
            for name, loss in made.items() if loss.on == "maps"
            for mine, his in taps.items() if his != LOGITS
        }  # fmt: skip
        several = number if len(nets) > 1 else None
        found = terms_of(made, taps, config.tap_weight, number=several, weight=weight, grids=grids)
        by_name = {name if several is None else f"{name}_t{number}": loss for name, loss in made.items()}
        for term in found:
            seed_everything(config.seed, 2, len(projectors))
            stages = [mine for mine, his in taps.items() if his == LOGITS]
            projector = make_projector(
                term, by_name[term.loss], student, net, (ours, theirs), stages, aad_expansion=config.aad_expansion
            )
            if projector is not None:
                projectors[term.key] = projector
        losses |= by_name
        terms += found
        kinds = dict.fromkeys(term.teacher.removeprefix(f"{number}:") for term in found)
        lives.append(LiveTeacher(net, tuple(sorted(kinds, key=_kind_order))))
    return DistillTask(
        student, lives[0] if len(lives) == 1 else Teachers(lives), losses, projectors,
        ce_weight=config.ce_weight, label_smoothing=config.label_smoothing, label_loss=config.label_loss,
        terms=terms,
    )  # fmt: skip


def _kind_order(kind: str) -> int:
    return ("features", "logits").index(kind) if kind in ("features", "logits") else 2


def check_taps(config: DistillConfig, losses: dict[str, DistillLoss], taps: dict[str, str]) -> None:
    """Every pair of taps must be compared by some loss, and losses on maps must have some.

    Raises:
        ValueError: not so.
    """
    modules = [mine for mine, theirs in taps.items() if theirs != LOGITS]
    if modules and not any(loss.on == "maps" or (loss.on == "features" and loss.at_taps) for loss in losses.values()):
        raise ValueError(
            f"taps are compared by feature losses, but loss={config.loss!r} has none; add 'mse', 'rsd', 'rkd' or 'fitnet'"
        )
    if len(modules) < len(taps) and not any(loss.at_stages for loss in losses.values()):
        raise ValueError(
            f"taps compared with 'logits' are stages of 'ofa', but loss={config.loss!r} has none; add 'ofa'"
        )
    for name, loss in losses.items():
        if loss.on == "maps" and not modules:
            raise ValueError(
                f"loss {name!r} compares modules inside the networks; name some with taps, such as "
                "taps={'layer3': 'blocks.9'} (--taps layer3 blocks.9)"
            )


def _make_losses(
    config: DistillConfig, teacher: FeatureModel, classes: int, labels: Any, number: int
) -> dict[str, DistillLoss]:
    """The losses towards one teacher, weights set."""
    losses: dict[str, DistillLoss] = {}
    for name, weight in parse_losses(config.loss).items():
        options = config.options_of(name)
        if name == "crd":
            if labels is None:
                raise ValueError("loss 'crd' remembers every training image; build the task with their labels")
            seed_everything(config.seed, 4, number)  # the memory bank
            named = torch.as_tensor(labels)
            options |= {"samples": len(named), "labels": named if len(named.unique()) > 1 else None}
        loss = create_loss(name, **options)
        chosen = config.loss_weight if weight is None else weight
        loss.weight = loss.default_weight if chosen is None else chosen
        if loss.on == "logits" and teacher.num_classes != classes:
            raise ValueError(
                f"loss {name!r} compares logits, but the teacher has {teacher.num_classes} classes and the data {classes}; "
                "fine-tune the teacher on this data first (xdfast.finetune(model=…)), or use a feature loss such as 'rsd'"
            )
        if waits_for_ranks(loss) and config.tail == "exact" and distributed.world_size() > 1:
            raise ValueError(
                f"loss {name!r} as set here talks to all processes in every step, which needs equally many images on each; "
                "use tail='drop'"
            )
        losses[name] = loss
    return losses
