"""``distill``: a student learns from a frozen teacher."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdfast import distributed
from xdfast.data import ImageLoader
from xdfast.losses import DistillLoss, create_loss, parse_losses
from xdfast.models import FeatureModel, create_model, tap_widths, weights_hash
from xdfast.nn import AAD
from xdfast.pipeline.actdistill_config import ActDistillConfig
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.data import Images, eval_loader, open_images, train_loader, view_size
from xdfast.pipeline.folder import RunResult, model_source, open_folder
from xdfast.pipeline.monitor import Monitor, sample
from xdfast.pipeline.parallel import prepare_teacher
from xdfast.pipeline.task import DistillTask, seed_everything, tap_key
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher, open_store
from xdfast.pipeline.train_run import make_student, run_training, settings_of

__all__ = ["distill"]

log = logging.getLogger("xdfast")

_DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def distill(
    config: DistillConfig | ActDistillConfig | None = None,
    *,
    teacher: str | nn.Module | RunResult | None = None,
    student: str | nn.Module | RunResult | None = None,
    data: Any = None,
    val_data: Any = None,
    **settings: Any,
) -> RunResult:
    """Trains ``student`` on ``data`` to imitate ``teacher``: L = ce_weight · CE + λ · L_distill.

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
        teacher, student: timm name, ``NAME@/path/weights``, folder of a run, an ``nn.Module``, or a finished run.
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

    def load_teacher() -> FeatureModel:
        seed_everything(config.seed, 3)  # a teacher without pretrained weights must be the same on every rank
        net = create_model(
            model_source(config.teacher if teacher is None else teacher),
            pretrained=config.teacher_pretrained,
            image_size=config.teacher_size,
            frozen=True,
            dtype=_DTYPES[config.teacher_precision],
            device=distributed.device_for_rank(config.device),
            options=config.teacher_options,
            taps=tuple(dict.fromkeys(config.taps.values())),
        )
        return prepare_teacher(net, config)

    teacher_net = load_teacher()
    student_net = make_student(config.student if student is None else student, config, classes)
    task = build_task(config, student_net, teacher_net, classes)
    size = view_size(config, images.train, [student_net, teacher_net])
    loader, batch_augment = train_loader(config, images.train, size, student_net)
    identity = {"teacher": weights_hash(teacher_net)}
    monitor = None
    if monitored and config.monitor and not task.uses_logits:
        device = distributed.device_for_rank(config.device)
        task.to(device)
        val, train = (
            eval_loader(
                sample(source, config.monitor), size, batch_size=config.batch_size, workers=config.workers,
                decoder=config.decoder, sharded=False,
            )
            for source in (images.val, images.train)
        )  # fmt: skip
        monitor = Monitor(val, train, task.projectors, teacher_net, device)
    if config.cache != "none":
        kinds = task.teacher.kinds
        store = open_store(
            config.cache, teacher_net, identity["teacher"], images.train, loader, kinds,
            views=config.cache_views, dtype=config.cache_dtype, precision=config.teacher_precision, amp=config.amp,
        )  # fmt: skip
        first = None if store.complete else teacher_net
        task.teacher = CachedTeacher(store, load_teacher, loader, kinds, net=first, progress=config.progress)
    return Prepared(task, images, loader, batch_augment, identity, monitor)


def build_task(config: DistillConfig, student: FeatureModel, teacher: FeatureModel, classes: int) -> DistillTask:
    """The losses and projectors of a config around two models.

    Raises:
        ValueError: a logit loss and a teacher whose classes are not the data's; taps without a feature loss.
    """
    losses: dict[str, DistillLoss] = {}
    projectors: dict[str, nn.Module] = {}
    for name, weight in parse_losses(config.loss).items():
        loss = create_loss(name, **_options(config, name))
        chosen = config.loss_weight if weight is None else weight
        loss.weight = loss.default_weight if chosen is None else chosen
        if loss.on == "logits" and teacher.num_classes != classes:
            raise ValueError(
                f"loss {name!r} compares logits, but the teacher has {teacher.num_classes} classes and the data {classes}; "
                "fine-tune the teacher on this data first (xdfast.finetune(model=…)), or use a feature loss such as 'rsd'"
            )
        losses[name] = loss
        if loss.on == "features":
            seed_everything(config.seed, 2, len(projectors))
            projectors[name] = AAD(student.num_features, teacher.num_features, config.aad_expansion)
    if config.taps:
        if not projectors:
            raise ValueError(
                f"taps are compared by feature losses, but loss={config.loss!r} has none; add 'mse' or 'rsd'"
            )
        ours, theirs = tap_widths(student), tap_widths(teacher)
        for name in [name for name, loss in losses.items() if loss.on == "features"]:
            for mine, his in config.taps.items():
                seed_everything(config.seed, 2, len(projectors))
                projectors[tap_key(name, mine)] = AAD(ours[mine], theirs[his], config.aad_expansion)
    needed = {loss.on for loss in losses.values()}
    kinds: list[str] = [kind for kind in ("features", "logits") if kind in needed]
    kinds += [f"tap:{tap}" for tap in dict.fromkeys(config.taps.values())]
    return DistillTask(
        student, LiveTeacher(teacher, tuple(kinds)), losses, projectors,
        ce_weight=config.ce_weight, label_smoothing=config.label_smoothing,
        taps=config.taps, tap_weight=config.tap_weight,
    )  # fmt: skip


def _options(config: DistillConfig, name: str) -> dict[str, Any]:
    if name.startswith("rsd"):
        return {"kappa": config.kappa, "return_components": True}
    return {"temperature": config.temperature} if name == "kd" else {}
