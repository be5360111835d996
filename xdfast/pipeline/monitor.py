"""How a distillation without labels is going: agreement with the teacher, and k-NN accuracy where there are classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.data import ImageSource, SubsetSource
from xdfast.data._rng import hash64
from xdfast.models import FeatureModel
from xdfast.pipeline.probes import knn_accuracy, linear_cka

__all__ = ["Monitor"]

_SAMPLE = 0x4D4F4E49


class Monitor:
    """Measures a student on up to ``limit`` validation images, without training anything.

    ``agreement`` is the mean cosine between the projected student features and the teacher's, ``cka`` the linear CKA of
    the student's own features with the teacher's, ``knn`` the accuracy of 20 nearest neighbours among as many training
    images (left out with a single class). What the teacher says of the validation images is computed once.

    Args:
        loaders: of validation and training images, unaugmented; see :func:`sample`.
        projectors: of the feature losses; the first one is looked through.
        teacher: frozen model, used only here.
        device: where to compute.
    """

    def __init__(self, val: Any, train: Any, projectors: nn.ModuleDict, teacher: FeatureModel, device: Any) -> None:
        self._val, self._train, self._projectors, self._device = val, train, projectors, device
        self._several = len(val.source.classes) > 1
        self._teacher, _, _ = self._features(teacher, val)

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> dict[str, float]:
        """``{"agreement", "cka", "knn"}`` of a student in its present state; it is left in eval mode."""
        student.eval()
        features, labels, _ = self._features(student, self._val)
        metrics = {}
        for projector in list(self._projectors.values())[:1]:
            was_training = projector.training
            projected = projector.eval()(features.to(self._device)).float().cpu()
            projector.train(was_training)
            metrics["agreement"] = float(F.cosine_similarity(projected, self._teacher, dim=1).mean())
        metrics["cka"] = linear_cka(features, self._teacher)
        if self._several:
            train, train_labels, _ = self._features(student, self._train)
            metrics["knn"] = knn_accuracy(train, train_labels, features, labels)
        return metrics

    @torch.no_grad()
    def _features(self, model: nn.Module, loader: Any) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for batch in loader.epoch(0):
            features = model(batch.images.to(self._device)).features.float().cpu()
            parts.append((features[batch.valid], batch.labels[batch.valid], batch.ids[batch.valid]))
        features, labels, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        if len(features) < 2:
            raise RuntimeError("fewer than two validation images could be read; see the warnings above")
        return features, labels, ids


def sample(source: ImageSource, limit: int) -> ImageSource:
    """Up to ``limit`` images of a source, chosen by a hash of their position: the same ones in every run."""
    if len(source) <= limit:
        return source
    order = np.argsort(hash64(_SAMPLE, np.arange(len(source))), kind="stable")
    return SubsetSource(source, np.sort(order[:limit]), part=source.part)
