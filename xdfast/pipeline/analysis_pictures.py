"""Pictures for a report: where models look in a few validation images, and the teacher's features beside the students'."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from xdfast.data import SubsetSource
from xdfast.models.gradcam import find_layer
from xdfast.models.saliency import grad_cam, occlusion
from xdfast.pipeline.analysis import Pictures, Subject, read_pictures
from xdfast.pipeline.data import eval_loader
from xdfast.pipeline.evaluate import EMBEDDING_SAMPLES, extract

if TYPE_CHECKING:
    from xdfast.models import FeatureModel
    from xdfast.reporting import Analysis

__all__ = ["add_saliency", "add_teacher_features"]

log = logging.getLogger("xdfast")

_SHOWN = 6
_LOOKED_AT = 256  # from which the shown ones are taken, so that they are of different classes
_MEAN_OF = 64


def add_saliency(pictures: Pictures, found: Analysis, *, device: torch.device) -> None:
    r"""Sets ``analysis["saliency"]`` of the teachers and of the best run of each method, and the pictures of ``found``.

    What is explained is the logit of the true class. Of a model without a classifier for these classes it is the part of the
    features that sets the picture apart,

    .. math:: y = \langle f(x), \; f(x_0) - \bar f \rangle

    with the direction held fixed at the picture itself, and the mean over 64 validation images. Grad-CAM where the model has a
    layer that keeps places, else occlusion; the record says which.

    ``maps`` float32 [n, S, S] in [0, 1], ``method``, ``said`` (predicted class, or None), ``right``.
    """
    if len(found.frames):  # pictures of one data set are enough
        found.remarks.append("Saliency is shown for the first of the data sets alone.")
        return
    views, labels = read_pictures(pictures, _LOOKED_AT)
    chosen = _one_of_each(labels, _SHOWN)
    found.frames = views[chosen]
    found.truths = [str(pictures.source.classes[label]) for label in labels[chosen]]
    others = torch.from_numpy(views[:_MEAN_OF]).permute(0, 3, 1, 2).float().div_(255).to(device)
    shown = torch.from_numpy(views[chosen]).permute(0, 3, 1, 2).float().div_(255).to(device)
    truth = torch.from_numpy(labels[chosen])
    teachers = list({id(s.teacher): s.teacher for s in pictures.best if s.teacher is not None}.values())
    for subject in [*teachers, *pictures.best]:
        subject.record.analysis["saliency"] = _saliency(subject, shown, truth, others, pictures.source.classes)


def _saliency(subject: Subject, shown: Tensor, truth: Tensor, others: Tensor, classes: list[str]) -> dict[str, object]:
    model = subject.model
    with torch.no_grad():
        output = model(shown)
        guesses = output.logits.argmax(1).cpu() if subject.classifies and output.logits is not None else None
        if guesses is None:
            directions = output.features.float() - model(others).features.float().mean(0)
            directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    score: Callable[[Tensor], Tensor]
    if guesses is not None:
        score, target, what = (lambda pixels: model(pixels).logits.float()), truth, "of the true class"
    else:
        score, target = (lambda pixels: model(pixels).features.float() @ directions.T), torch.arange(len(shown))
        what = "of what sets the picture's features apart"
    maps, method = _maps(model, shown, score, target)
    return {
        "maps": maps.numpy(),
        "method": f"{method}, {what}",
        "said": [None] * len(shown) if guesses is None else [str(classes[guess]) for guess in guesses.tolist()],
        "right": [None] * len(shown) if guesses is None else (guesses == truth).tolist(),
    }


def _maps(model: FeatureModel, shown: Tensor, score: Callable[[Tensor], Tensor], target: Tensor) -> tuple[Tensor, str]:
    try:
        layer = find_layer(model)
    except ValueError:  # an MLP, a transformer of another make
        log.info("%s has no layer that keeps places: its saliency is by occlusion", model.name)
        return occlusion(model, shown, score, target=target), "occlusion"
    return grad_cam(model, shown, score, target=target, layer=layer), f"Grad-CAM at {layer.name}"


def _one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of ``count`` images of as many classes as there are, in the order of classes."""
    rank = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        own = labels == label
        rank[own] = np.arange(own.sum())
    order = np.lexsort((np.arange(len(labels)), labels, rank))
    classes = len(np.unique(labels))
    if classes > count:  # spread over the classes
        order = order[np.linspace(0, classes - 1, count).round().astype(int)]
    return np.sort(order[:count])


def add_teacher_features(pictures: Pictures, *, device: torch.device, progress: bool) -> None:
    """Sets ``analysis["embedding"]`` of each teacher: what ``evaluate`` keeps of a student, of the same images."""
    total = len(pictures.source)
    keep = torch.linspace(0, total - 1, min(total, EMBEDDING_SAMPLES)).round().long().unique()
    source = SubsetSource(pictures.source, keep.numpy())
    for subject in (s for s in pictures.subjects if s.run is None):
        loader = eval_loader(source, subject.model.image_size, batch_size=64, workers="auto", sharded=False)
        title = f"{subject.record.name}: features"
        features, logits, labels, _ = extract(subject.model, loader, device, title=title, progress=progress)
        right = subject.classifies and logits is not None
        subject.record.analysis["embedding"] = {
            "features": features.numpy(),
            "labels": labels.numpy(),
            "predictions": logits.argmax(1).numpy() if right and logits is not None else np.full(len(labels), -1),
            "classes": list(pictures.source.classes),
        }
