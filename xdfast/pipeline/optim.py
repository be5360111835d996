"""Optimisers and schedules: timm's, torch's fused ones, and NVIDIA apex's on request."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from xdfast.errors import nearest
from xdfast.pipeline.config import RunConfig
from xdfast.pipeline.task import TrainingTask

__all__ = ["build_optimizer", "build_schedule"]

log = logging.getLogger("xdfast")

#: timm names whose torch optimiser has a fused kernel (one launch for all parameters).
_FUSED = ("sgd", "momentum", "adam", "adamw")


def build_optimizer(module: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimiser named by ``config.optimizer`` over the trainable parameters; no decay on biases and norms, unless the
    task makes groups of its own.

    Raises:
        ValueError: unknown name (nearest ones offered).
        ImportError: ``apex-…`` without NVIDIA apex; says whether PyPI's unrelated ``apex`` was found instead.
    """
    from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay

    name = config.optimizer.lower()
    own = module.parameter_groups(config) if isinstance(module, TrainingTask) else None
    if name.startswith(("apex-", "fused")):  # timm's own "fused…" names import whatever is called apex
        from xdfast._optional import require_apex_optimizer

        cls = require_apex_optimizer(name.removeprefix("apex-"))
        groups = own or param_groups_weight_decay(module, config.weight_decay)
        extra = {"momentum": config.momentum} if "sgd" in name else {}
        return cls(groups, lr=config.lr, **extra)
    if name not in list_optimizers():
        hint = nearest(name, map(str, list_optimizers()))
        raise ValueError(f"unknown optimizer {config.optimizer!r}.{hint} `timm.optim.list_optimizers()` has all")
    kwargs: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    if name in _FUSED:
        # torch has no fused SGD for sharded weights (FSDP)
        fused = "adam" in name or not any(hasattr(p, "device_mesh") for p in module.parameters())
        kwargs.update(fused=fused, foreach=not fused)
    return create_optimizer_v2(own or module, opt=name, **kwargs)


def build_schedule(optimizer: torch.optim.Optimizer, config: Any, updates_per_epoch: int) -> Any | None:
    """timm's schedule, stepped per update (a pure function of the update number), or None for a constant rate."""
    from timm.scheduler import create_scheduler_v2

    if config.schedule == "constant" and config.warmup_epochs == 0:
        return None
    if config.schedule == "constant":
        decay: dict[str, Any] = {"sched": "step", "decay_epochs": config.epochs + 1, "decay_rate": 1.0}
    elif config.schedule == "step":
        decay = {"sched": "step", "decay_epochs": config.decay_epochs, "decay_rate": 0.1}
    else:
        decay = {"sched": "cosine"}
    schedule, _ = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        **decay,
    )
    return schedule
