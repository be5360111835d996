"""What ``distill`` and ``finetune`` share: from models and images to a finished folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from xdfast import distributed
from xdfast.data import ImageLoader
from xdfast.models import FeatureModel, create_model, save_student
from xdfast.models.checkpoint import atomic_write
from xdfast.pipeline.alone import alone_in
from xdfast.pipeline.config import TrainConfig
from xdfast.pipeline.data import Images, eval_loader
from xdfast.pipeline.evaluate import accuracy
from xdfast.pipeline.folder import PROJECTORS_FILE, RunResult, finish, model_source
from xdfast.pipeline.loop import train
from xdfast.pipeline.monitor import Monitor
from xdfast.pipeline.parallel import check_layout
from xdfast.pipeline.task import TrainingTask, seed_everything

__all__ = ["as_spec", "make_student", "run_training", "settings_of"]

log = logging.getLogger("xdfast")


def settings_of(cls: Any, config: Any, models: dict[str, Any], data: dict[str, Any], settings: dict[str, Any]) -> Any:
    """One config from either a config object or keyword arguments; objects are recorded by their class name."""
    import dataclasses

    given = {k: v for k, v in {**models, **data}.items() if v is not None}
    named = {k: [as_spec(x) for x in v] if isinstance(v, (list, tuple)) else as_spec(v) for k, v in given.items()}
    if config is None:
        return cls.from_dict({**named, **settings}, source=f"{cls.__name__.removesuffix('Config').lower()}()")
    if not isinstance(config, cls):
        raise TypeError(f"expected a {cls.__name__} or keyword arguments, got {type(config).__name__}")
    cls.from_dict({**config.to_dict(), **settings})  # unknown names get the same error either way
    return dataclasses.replace(config, **cls.normalised({**named, **settings}))


def as_spec(value: Any) -> str:
    """The text that stands for a model or dataset in config.yaml."""
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, RunResult):
        return str(value.path)
    inner = getattr(value, "net", value)
    return f"object:{type(inner).__module__}.{type(inner).__qualname__}"


def make_student(value: Any, config: TrainConfig, num_classes: int) -> FeatureModel:
    """The student, with a classifier for the data at hand; seeded, so that every run and rank starts equal."""
    seed_everything(config.seed, 1)
    return create_model(
        model_source(value),
        num_classes=num_classes,
        pretrained=config.student_pretrained,
        image_size=config.student_size,
        options=config.student_options,
        taps=tuple(getattr(config, "taps", ())),
    )


def run_training(
    kind: str,
    task: TrainingTask,
    images: Images,
    loader: ImageLoader,
    batch_augment: Any | None,
    config: TrainConfig,
    out: Path,
    identity: dict[str, Any],
    monitor: Monitor | None = None,
) -> RunResult:
    """Trains, validates, saves the student and the summary; ``monitor`` validates where nothing trains the classifier."""
    device = distributed.device_for_rank(config.device)
    size = loader.views.image_size
    val = eval_loader(
        images.val, size, batch_size=config.batch_size, workers=config.workers, decoder=config.decoder,
        crop_pct=config.crop_pct,
    )  # fmt: skip

    def validate(net: nn.Module) -> dict[str, float]:
        if monitor is not None:
            return monitor(net)
        return (
            accuracy(net, val, device) if getattr(task, "uses_logits", True) else {}
        )  # of a classifier that is trained

    began = time.monotonic()
    pixels = "gpu" if loader.decoder == "dali-gpu" else "cpu"  # Pillow and DALI on the CPU give the same
    check_layout(config, device, loader.rows(loader.batches_per_epoch - 1))
    identity = {"images": images.fingerprint(), "view": size, "pixels": pixels, **identity}
    distributed.all_equal(identity, "the run's data and models")
    with alone_in(out):
        result = train(
            task,
            loader,
            config,
            out,
            device=device,
            validate=validate,
            validate_first=monitor is not None,
            batch_augment=batch_augment,
            identity=identity,
            title=out.name,
        )
    log.debug("%s took %.1f s in this session", out, time.monotonic() - began)
    if distributed.is_main():
        save_student(
            result.module,
            out / "student",
            classes=list(images.train.classes),
            extra={"kind": kind, "config": config.to_dict(), "metrics": result.metrics},
        )
        if result.projectors:
            state = {name: value.detach().cpu().contiguous() for name, value in result.projectors.items()}
            atomic_write(out / PROJECTORS_FILE, lambda aside: save_file(state, aside))
    images_seen = config.epochs * sum(map(loader.rows, range(loader.batches_per_epoch)))
    metrics = {
        **result.metrics,
        "seconds": result.seconds,
        "steps": result.step,
        "images_per_s": images_seen / max(result.seconds, 1e-9),
    }
    return finish(out, kind, config, metrics, {**val.bad, **loader.bad})
