"""``finetune``: supervised training of one model from scratch or from a distilled student; of a robot's policy, too."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from xdfast import distributed
from xdfast.pipeline.config import FinetuneConfig
from xdfast.pipeline.data import open_images, train_loader, view_size
from xdfast.pipeline.folder import RunResult, open_folder
from xdfast.pipeline.policy_config import PolicyConfig
from xdfast.pipeline.task import SupervisedTask
from xdfast.pipeline.train_run import make_student, run_training, settings_of
from xdfast.pipeline.vla_config import VLAConfig

__all__ = ["finetune"]

log = logging.getLogger("xdfast")


def finetune(
    model: str | nn.Module | RunResult | FinetuneConfig | PolicyConfig | None = None,
    *,
    data: Any = None,
    val_data: Any = None,
    **settings: Any,
) -> RunResult:
    """Trains ``model`` on labelled images with the cross-entropy.

    The classifier is made anew when the data has other classes than the model. ``freeze="encoder"`` trains the
    classifier alone. Resumes, runs under ``torchrun`` and saves like :func:`xdfast.distill`.

    With ``task``, ``model`` becomes the encoder of a robot's diffusion policy, and both learn together from demonstrations
    (X-Distill, stage 2; settings: :class:`PolicyConfig`)::

        policy = xd.finetune("runs/x", task="metaworld/drawer-open-v3", demos=10, out="runs/x-drawer")

    Args:
        model: timm name, ``NAME@/path/weights``, folder of a run, an ``nn.Module``, a finished run, or a
            :class:`FinetuneConfig` or :class:`PolicyConfig` with everything.
        data, val_data: path or name as in :class:`FinetuneConfig`, or a torch dataset of (image, label).
        settings: fields of :class:`FinetuneConfig`; of :class:`PolicyConfig` if ``task`` is among them, of
            :class:`VLAConfig` if ``tasks`` is.

    Returns:
        :class:`RunResult` with ``.student`` (or ``.policy``), ``.metrics``, ``.path``.

    Raises:
        ValueError: a bad setting, or an ``out`` folder of another config.
        RuntimeError: the loss is not finite, or the resume file belongs to other data.
    """
    if isinstance(model, VLAConfig) or "tasks" in settings:
        return _finetune_vla(model, data, val_data, settings)
    if isinstance(model, PolicyConfig) or "task" in settings:
        return _finetune_policy(model, data, val_data, settings)
    config, model = (model, None) if isinstance(model, FinetuneConfig) else (None, model)
    config = settings_of(FinetuneConfig, config, {"model": model}, {"data": data, "val_data": val_data}, settings)
    config.validate()
    distributed.init()
    out, finished = open_folder(config, "finetune")
    if finished is not None:
        log.info("%s is finished; returning its result", out)
        return finished
    images = open_images(config, data, val_data)
    net = make_student(config.model if model is None else model, config, len(images.train.classes))
    task = SupervisedTask(net, config.label_smoothing, config.label_loss, freeze_encoder=config.freeze == "encoder")
    size = view_size(config, images.train, [net])
    loader, batch_augment = train_loader(config, images.train, size, net)
    return run_training("finetune", task, images, loader, batch_augment, config, out, identity={})


def _finetune_policy(model: Any, data: Any, val_data: Any, settings: dict[str, Any]) -> RunResult:
    if data is not None or val_data is not None:
        raise ValueError(
            "a policy learns from demos=…, a number of scripted ones or a path; data and val_data are for images"
        )
    if "demos" in settings:
        settings = {**settings, "demos": str(settings["demos"])}
    config, model = (model, None) if isinstance(model, PolicyConfig) else (None, model)
    config = settings_of(PolicyConfig, config, {"model": model}, {}, settings)
    from xdfast.pipeline.finetune_policy import finetune_policy  # needs the robot extra

    return finetune_policy(config, model)


def _finetune_vla(model: Any, data: Any, val_data: Any, settings: dict[str, Any]) -> RunResult:
    if data is not None or val_data is not None:
        raise ValueError("a policy learns from demos=…, not from data and val_data, which are for images")
    if "demos" in settings:
        settings = {**settings, "demos": str(settings["demos"])}
    if "tasks" in settings and not isinstance(settings["tasks"], str):
        settings = {**settings, "tasks": tuple(settings["tasks"])}
    config, model = (model, None) if isinstance(model, VLAConfig) else (None, model)
    config = settings_of(VLAConfig, config, {"model": model}, {}, settings)
    from xdfast.pipeline.finetune_vla import finetune_vla  # needs the robot extra

    return finetune_vla(config, model)
