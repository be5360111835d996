"""``evaluate``: how accurate a model is, and how good its features are."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast import distributed
from xdfast.losses import create_loss, parse_losses
from xdfast.models import FeatureModel, create_model
from xdfast.models.checkpoint import CheckpointError, atomic_write
from xdfast.pipeline.config import EvaluateConfig
from xdfast.pipeline.data import eval_loader, open_images
from xdfast.pipeline.folder import RunResult, load_run, model_source, read_record
from xdfast.pipeline.journal import ProgressLine
from xdfast.pipeline.policy_config import EvaluatePolicyConfig
from xdfast.pipeline.probes import knn_accuracy, linear_cka, linear_probe_accuracy

if TYPE_CHECKING:
    from xdfast.pipeline.evaluate_policy import PolicyEvaluation

__all__ = ["EvaluateResult", "accuracy", "evaluate"]

log = logging.getLogger("xdfast")

#: Most samples whose features are kept for pictures (t-SNE is quadratic).
EMBEDDING_SAMPLES = 2000


@dataclass
class EvaluateResult:
    """What ``evaluate`` measured.

    Attributes:
        model: name of the model.
        path: folder with evaluation.json, or None.
        metrics: top1, top5, loss, knn, linear_probe, cka (those that apply), accuracies in [0, 1].
        classes: class names.
        confusion: [C][C] counts, rows are true classes.
        skipped: path → reason of images that could not be read.
        embedding: features [M, F], labels [M], predictions [M] of up to 2,000 validation images.
    """

    model: str
    path: Path | None
    metrics: dict[str, float]
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    embedding: dict[str, np.ndarray] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the embedding."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "embedding"}
        return {**values, "path": str(self.path) if self.path else None}

    def __repr__(self) -> str:
        figures = ", ".join(f"{k}={v:.4g}" for k, v in self.metrics.items())
        return f"EvaluateResult({self.model}, {figures})"


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, device: torch.device) -> dict[str, float]:
    """top1, top5 (in [0, 1]) and cross-entropy over a loader, summed over ranks; unreadable images do not count.

    top5 is left out when there are fewer than six classes. A model without classifier gives {}.
    """
    model.eval()
    sums = [0.0, 0.0, 0.0, 0.0]  # right at 1, right at 5, loss, images
    classes = 0
    for batch in loader.epoch(0):
        valid = batch.valid.to(device)
        logits = model(batch.images.to(device)).logits
        if logits is None:
            return {}
        classes = logits.shape[1]
        logits, labels = logits.float()[valid], batch.labels.to(device)[valid]
        if len(labels) == 0:
            continue
        top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        for i, value in enumerate(
            (top[:, 0].sum(), top.sum(), F.cross_entropy(logits, labels, reduction="sum"), len(labels))
        ):
            sums[i] += float(value)
    right1, right5, loss, images = distributed.sum_over_ranks(sums, device)
    if images == 0:
        raise RuntimeError("no validation image could be read; see the warnings above for the files and reasons")
    result = {"top1": right1 / images, "loss": loss / images}
    return result | ({"top5": right5 / images} if classes > 5 else {})


@torch.no_grad()
def extract(
    model: nn.Module, loader: Any, device: torch.device, *, title: str, progress: bool, limit: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(features [M, F], logits [M, C] or None, labels [M], ids [M]) of the readable images, on the CPU."""
    model.eval()
    line = ProgressLine(title, loader.batches_per_epoch, enabled=progress and distributed.is_main())
    parts: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
    count = 0
    for number, batch in enumerate(loader.epoch(0), 1):
        output = model(batch.images.to(device))
        keep = batch.valid
        logits = None if output.logits is None else output.logits.float().cpu()[keep]
        parts.append((output.features.float().cpu()[keep], logits, batch.labels[keep], batch.ids[keep]))
        count += int(keep.sum())
        line.update(number, f"{count:,} images")
        if limit is not None and count >= limit:
            break
    line.close()
    if count == 0:
        raise RuntimeError("no image could be read; see the warnings above for the files and reasons")
    features, logits, labels, ids = zip(*parts, strict=True)
    return (
        torch.cat(features),
        None if logits[0] is None else torch.cat([x for x in logits if x is not None]),
        torch.cat(labels),
        torch.cat(ids),
    )


def evaluate(
    model: str | RunResult | FeatureModel | nn.Module | EvaluateConfig | EvaluatePolicyConfig | None = None,
    *,
    data: Any = None,
    val_data: Any = None,
    teacher: Any = None,
    **settings: Any,
) -> EvaluateResult | PolicyEvaluation:
    """Top-1/top-5, k-NN, linear probe and linear CKA to the teacher, on the validation images; of a robot's policy, the
    success rate in simulation::

        result = xd.evaluate(policy, episodes=50, videos=3)  # settings: EvaluatePolicyConfig

    Args:
        model: a run (or its folder), a timm name, an ``nn.Module``, an :class:`EvaluateConfig` or
            :class:`EvaluatePolicyConfig`.
        data, val_data: as in :class:`EvaluateConfig`, or a dataset object; default: those of the run.
        teacher: name or module for the CKA; default: that of the run; False for none.
        settings: other fields of :class:`EvaluateConfig` (of :class:`EvaluatePolicyConfig` for a policy).

    Returns:
        :class:`EvaluateResult` or :class:`PolicyEvaluation`; also written to ``evaluation.json`` in ``out`` or the run's
        folder.

    Raises:
        ValueError: a bad setting, no data given, or classes that do not fit the model.
    """
    run = _as_run(model.model if isinstance(model, (EvaluateConfig, EvaluatePolicyConfig)) else model)
    if _is_policy(model, run):
        return _evaluate_policy(model, run, data, val_data, teacher, settings)
    config = _config(model, run, data, val_data, teacher, settings)
    config.validate()
    device = distributed.device_for_rank(config.device)
    images = open_images(config, data, val_data)

    if run is not None:
        net, name = run.student, run.path.name
    elif isinstance(model, nn.Module):
        net, name = create_model(model), type(getattr(model, "net", model)).__name__
    else:
        net, name = create_model(model_source(config.model), pretrained=True), config.model
    net = net.to(device)
    if net.num_classes and net.num_classes != len(images.val.classes):
        log.warning(
            "the model has %d classes, the data %d: top-1 is left out", net.num_classes, len(images.val.classes)
        )

    crop_pct = config.crop_pct or (run.config.get("crop_pct") if run is not None else None) or 1.0

    def loader(source: Any, size: int) -> Any:
        return eval_loader(
            source,
            size,
            batch_size=config.batch_size,
            workers=config.workers,
            decoder=config.decoder,
            sharded=False,
            crop_pct=crop_pct,
        )

    val = loader(images.val, net.image_size)
    features, logits, labels, ids = extract(net, val, device, title=f"{name}: validation", progress=config.progress)
    result = EvaluateResult(name, None, {}, list(images.val.classes))
    untrained = run is not None and not trains_classifier(run.config)
    if untrained:
        log.info("nothing has trained the classifier of %s yet: top-1 is left out", name)
    if logits is not None and logits.shape[1] == len(images.val.classes) and not untrained:
        _classification(result, logits, labels)
    skipped = dict(val.bad)

    if config.knn or config.linear_probe:
        train = loader(images.train, net.image_size)
        train_features, _, train_labels, _ = extract(
            net, train, device, title=f"{name}: training set", progress=config.progress, limit=config.probe_samples
        )
        skipped |= train.bad
        if config.knn:
            result.metrics["knn"] = knn_accuracy(train_features, train_labels, features, labels, k=config.knn)
        if config.linear_probe and len(train_labels.unique()) > 1:
            result.metrics["linear_probe"] = linear_probe_accuracy(train_features, train_labels, features, labels)
    if config.cka and config.teacher and teacher is not False:
        result.metrics["cka"] = _cka_to_teacher(config, teacher, run, features, ids, loader, images, device)

    keep = torch.linspace(0, len(labels) - 1, min(len(labels), EMBEDDING_SAMPLES)).round().long()
    predictions = logits.argmax(1) if result.confusion and logits is not None else torch.full_like(labels, -1)
    result.embedding = {
        "features": features[keep].numpy(),
        "labels": labels[keep].numpy(),
        "predictions": predictions[keep].numpy(),
    }
    result.skipped = skipped
    out = Path(config.out) if config.out else (run.path if run is not None else None)
    if out is not None and distributed.is_main():
        _write(result, out)
    return result


def _is_policy(model: Any, run: RunResult | None) -> bool:
    if isinstance(model, EvaluatePolicyConfig) or (run is not None and run.kind in ("policy", "vla")):
        return True
    kinds = ("DiffusionPolicy", "CompactVLA", "HuggingFaceVLA", "InstructedVLA")
    return isinstance(model, nn.Module) and type(model).__name__ in kinds


def _evaluate_policy(
    model: Any, run: RunResult | None, data: Any, val_data: Any, teacher: Any, settings: dict[str, Any]
) -> PolicyEvaluation:
    for name, value in (("data", data), ("val_data", val_data), ("teacher", teacher)):
        if value is not None and value is not False:
            raise ValueError(f"{name} has no meaning for a policy: it is evaluated in simulation")
    if isinstance(model, EvaluatePolicyConfig):
        config = dataclasses.replace(model, **settings)
    else:
        config = EvaluatePolicyConfig.from_dict({"model": str(run.path) if run else "object", **settings})
    from xdfast.pipeline.evaluate_policy import evaluate_policy  # needs the robot extra

    policy: Any = model if run is None and isinstance(model, nn.Module) else None
    return evaluate_policy(config, policy, run)


def trains_classifier(config: dict[str, Any]) -> bool:
    """Whether a run with these settings trains the student's classifier: with labels, or by a loss on logits."""
    if config.get("loss") is None:
        return True
    on_logits = any(create_loss(name).on == "logits" for name in parse_losses(str(config["loss"])))
    return bool(config.get("ce_weight", 1.0) > 0 or on_logits)


def _as_run(model: Any) -> RunResult | None:
    if isinstance(model, RunResult):
        return model
    if isinstance(model, (str, Path)) and (Path(model) / "config.yaml").is_file():
        return load_run(model)
    return None


def _config(
    model: Any, run: RunResult | None, data: Any, val_data: Any, teacher: Any, settings: dict[str, Any]
) -> EvaluateConfig:
    """Explicit settings over the run's own."""
    if isinstance(model, EvaluateConfig):
        config = dataclasses.replace(model, **settings)
    elif model is None:
        raise ValueError("evaluate needs a model: a run, its folder, a timm name or an nn.Module")
    else:
        name = str(run.path) if run is not None else model if isinstance(model, str) else type(model).__name__
        config = EvaluateConfig.from_dict({"model": name, **settings})
    for field_name, value in (("data", data), ("val_data", val_data), ("teacher", teacher)):
        if value is not None and value is not False:
            setattr(config, field_name, value if isinstance(value, str) else type(value).__name__)
    if run is not None:
        defaults = EvaluateConfig(model=config.model)
        for key in ("data", "val_data", "val_fraction", "labels_per_class", "teacher"):
            if getattr(config, key) == getattr(defaults, key) and run.config.get(key) is not None:
                setattr(config, key, run.config[key])
    if config.data is None:
        raise ValueError(
            "evaluate needs data: a folder of class folders, a zip archive, 'torchvision:NAME' or a dataset"
        )
    return config


def _classification(result: EvaluateResult, logits: Tensor, labels: Tensor) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

    classes = logits.shape[1]
    result.metrics["top1"] = float(multiclass_accuracy(logits, labels, num_classes=classes, average="micro"))
    if classes > 5:
        result.metrics["top5"] = float(
            multiclass_accuracy(logits, labels, num_classes=classes, average="micro", top_k=5)
        )
    result.metrics["loss"] = float(F.cross_entropy(logits, labels))
    result.confusion = multiclass_confusion_matrix(logits.argmax(1), labels, num_classes=classes).tolist()


def _cka_to_teacher(
    config: EvaluateConfig,
    teacher: Any,
    run: RunResult | None,
    features: Tensor,
    ids: Tensor,
    loader: Any,
    images: Any,
    device: torch.device,
) -> float:
    options = (run.config if run is not None else {}) or {}
    spec = teacher if isinstance(teacher, nn.Module) else model_source(config.teacher)
    net = create_model(
        spec, pretrained=options.get("teacher_pretrained", True), image_size=options.get("teacher_size"), frozen=True
    )
    net = net.to(device)
    teacher_features, _, _, teacher_ids = extract(
        net, loader(images.val, net.image_size), device, title="teacher", progress=config.progress
    )
    if not torch.equal(ids, teacher_ids):
        raise RuntimeError("teacher and student read different images: a file changed or broke during the evaluation")
    return linear_cka(features, teacher_features)


def _write(result: EvaluateResult, out: Path) -> None:
    result.path = out
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=2)
    atomic_write(out / "evaluation.json", lambda aside: aside.write_text(text, encoding="utf-8"))

    def save(aside: Path) -> None:
        with open(aside, "wb") as file:
            arrays: dict[str, Any] = result.embedding
            np.savez_compressed(file, **arrays)

    atomic_write(out / "embedding.npz", save)


def load_evaluation(path: Path) -> EvaluateResult | None:
    """What an earlier ``evaluate`` left in a run's folder, or None.

    Raises:
        CheckpointError: one of its files is damaged.
    """
    file = path / "evaluation.json"
    if not file.is_file():
        return None
    known = [field.name for field in dataclasses.fields(EvaluateResult)]
    values = read_record(file, {"model": str, "metrics": dict}, known)
    values["path"] = path
    result = EvaluateResult(**values)
    if (path / "embedding.npz").is_file():
        try:
            with np.load(path / "embedding.npz") as arrays:
                result.embedding = {key: arrays[key] for key in arrays.files}
        except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise almost any type
            raise CheckpointError(f"{path / 'embedding.npz'} is damaged ({error}); evaluate the run again") from error
    return result
