"""Accuracy under common corruptions: every model on the same corrupted pixels, corrupted once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from xdfast.data import Augment, ImageLoader
from xdfast.data.corruptions import FAMILIES, SEVERITIES, CorruptedSource, corruptions_version
from xdfast.models import weights_hash
from xdfast.pipeline.analysis import Memory, Pictures, Subject, read_pictures
from xdfast.pipeline.journal import ProgressLine

__all__ = ["add_robustness"]

_SEED = 0


@torch.no_grad()
def add_robustness(pictures: Pictures, memory: Memory, *, count: int, device: torch.device, progress: bool) -> None:
    """Sets ``analysis["robustness"]`` of every run and teacher with a classifier for the classes of the data.

    ``clean`` accuracy, ``accuracy``: corruption → one value for each severity 1 to 5, ``mean`` over all of them, ``images``,
    ``size``. Accuracies are in [0, 1]; ``mean`` is also the record's metric ``corrupted``.
    """
    waiting: list[tuple[Subject, dict[str, Any]]] = []
    for subject in (s for s in pictures.subjects if s.classifies):
        key = {
            "part": "robustness", "version": 1, "model": weights_hash(subject.model), "own_size": subject.model.image_size,
            "images": pictures.fingerprint, "count": count, "size": pictures.size, "seed": _SEED,
            "package": corruptions_version(),
        }  # fmt: skip
        found = memory.recall(key)
        if found is None:
            waiting.append((subject, key))
        else:
            _set(subject, found)
    if not waiting:
        return
    views, labels = read_pictures(pictures, count)
    source = CorruptedSource(views, labels, pictures.source.classes, seed=_SEED)
    right = _right([subject for subject, _ in waiting], source, pictures.size, device, progress)
    for (subject, key), mine in zip(waiting, right, strict=True):
        by_cell = mine.reshape(1 + len(source.cells), len(views)).mean(1)
        cells = dict(zip(source.cells, by_cell[1:].tolist(), strict=True))
        values = {
            "clean": float(by_cell[0]),
            "accuracy": {name: [cells[name, s] for s in SEVERITIES] for family in FAMILIES.values() for name in family},
            "mean": float(by_cell[1:].mean()),
            "images": len(views),
            "size": pictures.size,
        }
        memory.keep(key, values)
        _set(subject, values)


def _set(subject: Subject, values: dict[str, Any]) -> None:
    subject.record.analysis["robustness"] = values
    if subject.run is not None:
        subject.record.metrics["corrupted"] = values["mean"]  # type: ignore[union-attr]


def _right(
    subjects: list[Subject], source: CorruptedSource, size: int, device: torch.device, progress: bool
) -> np.ndarray:
    """bool ``[models, images of the source]``: who knew what."""
    loader = ImageLoader(source, 64, size, train=False, augment=Augment(), workers="auto", decoder="pillow")
    line = ProgressLine("robustness", loader.batches_per_epoch, enabled=progress)
    right = np.zeros((len(subjects), len(source)), dtype=bool)
    for number, batch in enumerate(loader.epoch(0), 1):
        pixels, labels = batch.images.to(device), batch.labels
        for subject, mine in zip(subjects, right, strict=True):
            logits = subject.model(pixels).logits
            mine[batch.ids.numpy()] = (logits.argmax(1).cpu() == labels).numpy()
        line.update(number, f"{min(64 * number, len(source)):,} images")
    line.close()
    return right
