"""Measures an epoch of distillation with a live teacher against one that reads the teacher cache, on the same views."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdfast.data import Augment, ImageLoader, SubsetSource
from xdfast.losses import FeatureMSELoss
from xdfast.models import create_model, weights_hash
from xdfast.nn import AAD
from xdfast.pipeline.task import DistillTask
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher, open_store
from xdfast.reporting.flops import count_flops

from .data import cpu_seconds, open_images
from .harness import interleave, ratios

__all__ = ["MUST_REACH", "STRETCH", "measure"]

#: Time of a live epoch over that of a cached one.
MUST_REACH, STRETCH = 5.0, 8.0

_SIZE, _BATCH, _IMAGES = 224, 8, 16


def measure(root: Path, store: Path, teacher: str, *, budget: float = 120.0) -> dict[str, Any]:
    """Wall and CPU seconds of an epoch (loading, teacher or cache, student step) of ResNet-18, live and cached.

    The teacher has random weights: they cost what trained ones cost. Both students start equal and see the same batches.

    Args:
        root: class folders of images.
        store: folder for the cache, float32.
        teacher: timm name.
        budget: seconds for all rounds.

    Returns:
        ``seconds`` and ``cpu_seconds`` by candidate, ``ratio`` (wall, CPU, FLOPs), ``weights_differ`` (largest difference
        of the two students' weights in the end, relative to the largest weight), facts of the run.
    """
    torch.manual_seed(0)
    net = create_model(teacher, pretrained=False, image_size=_SIZE, frozen=True)
    student = create_model("resnet18", num_classes=0, image_size=_SIZE)
    source = open_images(root)
    source = SubsetSource(source, np.linspace(0, len(source) - 1, _IMAGES).astype(np.int64))
    loader = ImageLoader(
        source, _BATCH, _SIZE, True, Augment(), workers=1, fixed_views=1, digests=True, decoder="pillow"
    )
    kinds = ("features",)
    rows = open_store(
        str(store), net, weights_hash(net), source, loader, kinds, views=1, dtype="float32", precision="float32", amp="none"
    )  # fmt: skip
    cached = CachedTeacher(rows, lambda: net, loader, kinds, progress=False)
    cached.fill()
    cached.begin_epoch(0)  # complete: lets go of the teacher
    projector = AAD(student.num_features, net.num_features, 0)
    tasks = {
        name: DistillTask(
            copy.deepcopy(student), said, {"mse": FeatureMSELoss()}, {"mse": copy.deepcopy(projector)}, ce_weight=0.0
        )
        for name, said in (("live", LiveTeacher(net, kinds)), ("cached", cached))
    }
    cpu: dict[str, list[float]] = {name: [] for name in tasks}

    def candidate(name: str) -> Any:
        task = tasks[name].train()
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.01)
        epochs = itertools.count()

        def epoch() -> None:
            began = cpu_seconds()
            for batch in loader.epoch(next(epochs)):
                images = batch.images.float().div_(255)
                optimizer.zero_grad()
                task(images, batch.labels, **task.teach(images, batch))["loss"].backward()
                optimizer.step()
            cpu[name].append(cpu_seconds() - began)

        return epoch

    times = interleave({name: candidate(name) for name in tasks}, budget=budget, rounds=(3, 9), warmup=1)
    loader.close()
    a, b = (torch.cat([p.detach().flatten() for p in tasks[name].student.parameters()]) for name in tasks)
    said = rows.nbytes
    cached.close()
    forward, step = flops(net), 3 * flops(student)
    median = {name: sorted(values)[len(values) // 2] for name, values in cpu.items()}
    return {
        "teacher": teacher,
        "images": len(source),
        "batch": _BATCH,
        "rounds": len(times["live"]),
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "cpu_seconds": median,
        "ratio": {
            "wall": ratios(times, "cached")["live"],
            "cpu": median["live"] / median["cached"],
            "flops": (forward + step) / step,
        },
        "weights_differ": float((a - b).abs().max() / a.abs().max()),
        "cache_bytes": said,
    }


def flops(model: Any) -> float:
    """FLOPs of one image, forward."""
    return float(count_flops(model, image_size=_SIZE).flops)
