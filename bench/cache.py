"""Measures an epoch of distillation with a live teacher against one that reads the teacher cache, on the same views.

On a GPU also against a loop in plain PyTorch.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdfast.data import Augment, Batch, ImageLoader, SubsetSource
from xdfast.data.decoder import Decoder
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

_SIZE = 224


def measure(
    root: Path,
    store: Path,
    teacher: str,
    *,
    device: str = "cpu",
    batch: int = 8,
    images: int = 16,
    workers: int = 1,
    decoder: Decoder = "pillow",
    amp: bool = False,
    plain: bool = False,
    budget: float = 120.0,
) -> dict[str, Any]:
    """Wall and CPU seconds of an epoch (loading, teacher or cache, student step) of ResNet-18, live and cached.

    The teacher has random weights: they cost what trained ones cost. Both students start equal and see the same batches.

    Args:
        root: class folders of images.
        store: folder for the cache, float32.
        teacher: timm name.
        device: where both models are.
        batch, images: per step and per epoch; of fewer images there are, some come twice.
        workers, decoder: of our loader; the plain one has as many workers.
        amp: teacher and student in bfloat16.
        plain: also a loop as one writes it in plain PyTorch: torchvision's DataLoader, live teacher.
        budget: seconds for all rounds.

    Returns:
        ``seconds`` and ``cpu_seconds`` by candidate, ``ratio`` (wall, CPU, FLOPs), ``weights_differ`` (largest difference
        of the two students' weights in the end, relative to the largest weight), facts of the run.
    """
    torch.manual_seed(0)
    net = create_model(teacher, pretrained=False, image_size=_SIZE, frozen=True, device=device)
    student = create_model("resnet18", num_classes=0, image_size=_SIZE)
    source = open_images(root)
    source = SubsetSource(source, np.linspace(0, len(source) - 1, images).astype(np.int64))
    loader = ImageLoader(
        source, batch, _SIZE, True, Augment(), workers=workers, fixed_views=1, digests=True, decoder=decoder
    )
    kinds = ("features",)
    rows = open_store(
        str(store), net, weights_hash(net), source, loader, kinds, views=1, dtype="float32", precision="float32", amp="none"
    )  # fmt: skip
    cached = CachedTeacher(rows, lambda: net, loader, kinds, progress=False)
    mixed = partial(torch.autocast, torch.device(device).type, dtype=torch.bfloat16, enabled=amp)
    with mixed():
        cached.fill()
    cached.begin_epoch(0)  # complete: lets go of the teacher
    projector = AAD(student.num_features, net.num_features, 0)
    tasks = {
        name: DistillTask(
            copy.deepcopy(student), said, {"mse": FeatureMSELoss()}, {"mse": copy.deepcopy(projector)}, ce_weight=0.0
        ).to(device)
        for name, said in (("live", LiveTeacher(net, kinds)), ("cached", cached), ("plain", LiveTeacher(net, kinds)))
        if plain or name != "plain"
    }
    cpu: dict[str, list[float]] = {name: [] for name in tasks}

    def candidate(name: str) -> Any:
        task = tasks[name].train()
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.01)
        epochs = itertools.count()

        def step(pixels: torch.Tensor, labels: torch.Tensor, of: Batch | None) -> None:
            pixels = pixels.to(device, non_blocking=True).float().div_(255)
            optimizer.zero_grad()
            with mixed():
                told = {"teacher_features": net(pixels).features} if of is None else task.teach(pixels, of)
                loss = task(pixels, labels, **told)["loss"]
            loss.backward()
            optimizer.step()

        def epoch() -> None:
            began = cpu_seconds()
            if name == "plain":
                for pixels, labels in rival:
                    step(pixels, labels, None)
            else:
                for found in loader.epoch(next(epochs)):
                    step(found.images, found.labels, found)
            cpu[name].append(cpu_seconds() - began)

        return epoch

    rival = _torchvision(root, batch, images, workers) if plain else []
    times = interleave({name: candidate(name) for name in tasks}, budget=budget, rounds=(3, 9), warmup=1, device=device)
    loader.close()
    a, b = (torch.cat([p.detach().flatten() for p in tasks[name].student.parameters()]) for name in ("live", "cached"))
    said = rows.nbytes
    cached.close()
    forward, step = flops(net), 3 * flops(student)
    median = {name: sorted(values)[len(values) // 2] for name, values in cpu.items()}
    return {
        "teacher": teacher,
        "images": len(source),
        "batch": batch,
        "device": device,
        "decoder": loader.decoder,
        "amp": amp,
        "rounds": len(times["live"]),
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in times.items()},
        "images_per_s": {name: images / sorted(values)[len(values) // 2] for name, values in times.items()},
        "cpu_seconds": median,
        "ratio": {
            "wall": ratios(times, "cached")["live"],
            **({"wall_plain": ratios(times, "cached")["plain"]} if plain else {}),
            "cpu": median["live"] / median["cached"],
            "flops": (forward + step) / step,
        },
        "weights_differ": float((a - b).abs().max() / a.abs().max()),
        "cache_bytes": said,
    }


def _torchvision(root: Path, batch: int, images: int, workers: int) -> Any:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    views = transforms.Compose(
        [
            transforms.RandomResizedCrop(_SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    folder = ImageFolder(str(root), views)
    chosen = torch.utils.data.Subset(folder, np.linspace(0, len(folder) - 1, images).astype(int).tolist())
    return torch.utils.data.DataLoader(
        chosen, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def flops(model: Any) -> float:
    """FLOPs of one image, forward."""
    return float(count_flops(model, image_size=_SIZE).flops)
