"""Measures the image loader: ours by decoder, a plain torchvision DataLoader and DALI's own random crop, in one interleaved run.

All make uint8 views of 224 × 224 of the same JPEGs: random resized crop, antialiased, flip. What counts is CPU time per
image, of this process and its workers: other processes disturb it less than they do wall time.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from xdfast.data import Augment, ImageLoader, ImageSource, SubsetSource, open_source

from .harness import interleave, ratios

__all__ = [
    "MUST_REACH",
    "OURS",
    "STRETCH",
    "cpu_seconds",
    "make_photographs",
    "measure",
    "one_pass",
    "open_images",
    "our_loader",
    "parity",
]

OURS = "xdfast dali"
#: CPU time of each rival over ours; "parity": mean |difference| to Pillow's resized_crop, in steps of 0..255.
MUST_REACH = {"torchvision": 1.4, "dali's own crop": 1 / 1.1, "parity": 0.25}
STRETCH = {"torchvision": 1.8}

_SIZE, _BATCH, _WORKERS, _IMAGES = 224, 50, 2, 500

Run = Callable[[], int]  # one pass over the images; how many they were


def make_photographs(root: Path, count: int = 250, seed: int = 0) -> Path:
    """Class folders of JPEGs that cost about as much to decode as photographs: noise at several scales, about 100 kB.

    Args:
        root: folder to make; five classes.
        count: images, of about 500 × 375 pixels.
        seed: of the noise; the same seed gives the same pixels.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = (int(side * rng.uniform(0.8, 1.25)) for side in (500, 375))
        pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
        for cell, strength in ((128, 55.0), (32, 25.0), (8, 14.0), (3, 29.0)):
            shape = (height // cell + 2, width // cell + 2, 3)
            noise = np.clip(128 + strength * rng.standard_normal(shape), 0, 255).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), np.float32)
            pixels -= 128
        folder = root / f"class{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=93)
    return root


def open_images(root: Path) -> ImageSource:
    """At most 500 images of a folder, spread evenly."""
    source = open_source(root, val_fraction=None)
    if len(source) <= _IMAGES:
        return source
    return SubsetSource(source, np.linspace(0, len(source) - 1, _IMAGES).astype(np.int64))


def measure(
    root: Path, interpolation: str, *, budget: float = 40.0, rounds: tuple[int, int] = (3, 9)
) -> dict[str, Any]:
    """Everything known about one interpolation.

    Args:
        root: class folders of JPEGs.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        budget: seconds for the timed rounds.
        rounds: at least and at most so many.

    Returns:
        ``images`` (their number, median bytes and sides), ``cpu_ms`` and ``wall_ms`` per image by candidate (median and
        minimum of the rounds; DALI's reader begins a pass with two batches made ahead, which its wall time lacks and its CPU
        time has), ``speedup`` of ours over each in CPU time (with quartiles of the rounds), ``pillow_speedup``
        of our loader without DALI over torchvision's, ``parity`` to Pillow, ``reached``: :data:`MUST_REACH` by name.
    """
    source = open_images(root)
    passes = max(1, -(-_IMAGES // len(source)))
    decoders = {OURS: "dali", "xdfast pillow": "pillow"}
    loaders = {name: our_loader(source, interpolation, decoder) for name, decoder in decoders.items()}
    candidates: dict[str, Run] = {name: one_pass(loader, passes) for name, loader in loaders.items()}
    candidates["torchvision"] = _torchvision(root, source, interpolation, passes)
    candidates["dali's own crop"] = _dali(source, interpolation, passes)
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}

    def timed(name: str, run: Run) -> Callable[[], None]:
        def once() -> None:
            begin, began = cpu_seconds(), time.perf_counter()
            count = run()
            wall[name].append((time.perf_counter() - began) / count * 1e3)
            cpu[name].append((_settled() - begin) / count * 1e3)

        return once

    turns = interleave({n: timed(n, run) for n, run in candidates.items()}, budget=budget, rounds=rounds, warmup=1)
    count = len(turns[OURS])
    cpu, wall = ({name: values[-count:] for name, values in times.items()} for times in (cpu, wall))  # not the warm-up
    found = parity(loaders[OURS])
    for loader in loaders.values():
        loader.close()
    gc.collect()  # the other candidates' processes and threads
    speedup = ratios(cpu, OURS)
    sides = np.array([source.size(i) for i in range(len(source))])
    return {
        "interpolation": interpolation,
        "images": {
            "count": len(source),
            "median_bytes": statistics.median(len(source.read(i) or b"") for i in range(len(source))),
            "median_sides": np.median(sides, axis=0).astype(int).tolist(),
        },
        "batch_size": _BATCH,
        "workers": _WORKERS,
        "rounds": count,
        "versions": _versions(),
        "cpu_ms": {name: _summary(values) for name, values in cpu.items()},
        "wall_ms": {name: _summary(values) for name, values in wall.items()},
        "speedup": speedup,
        "pillow_speedup": ratios({n: cpu[n] for n in ("torchvision", "xdfast pillow")}, "xdfast pillow"),
        "parity": found,
        "reached": {
            **{name: speedup[name]["ratio"] >= MUST_REACH[name] for name in speedup if name in MUST_REACH},
            "parity": found["mean"] <= MUST_REACH["parity"],
        },
    }


def our_loader(source: ImageSource, interpolation: str, decoder: Any) -> ImageLoader:
    """Training views as all candidates make them."""
    augment = Augment(interpolation=interpolation)
    return ImageLoader(source, _BATCH, _SIZE, True, augment, decoder=decoder, workers=_WORKERS)


def one_pass(loader: ImageLoader, passes: int = 1) -> Run:
    """Reads that many epochs a call, other views in each."""
    epochs = itertools.count()

    def run() -> int:
        return sum(len(batch) for _ in range(passes) for batch in loader.epoch(next(epochs)))

    return run


def cpu_seconds() -> float:
    """CPU time of this process and of those it has started, ended or not."""
    import psutil

    own = psutil.Process()
    times = own.cpu_times()
    total = time.process_time() + times.children_user + times.children_system
    for child in own.children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def _settled() -> float:
    """:func:`cpu_seconds` once nothing works ahead any more: DALI's reader does, on the account of whoever is next."""
    before = cpu_seconds()
    for _ in range(100):
        time.sleep(0.05)
        now = cpu_seconds()
        if now - before < 0.02:
            return now
        before = now
    return before


def parity(loader: ImageLoader) -> dict[str, float]:
    """Our views against Pillow's crop and resize of the same boxes, in steps of 0..255: the mean, the largest, images."""
    views, resample = loader.views, Image.Resampling[loader.views.augment.interpolation.upper()]
    sums, largest = [], 0
    for batch in loader.epoch(0):
        for image, i, slot, view in zip(batch.images, batch.ids, batch.slots, batch.views, strict=True):
            whole = loader.source.load(int(i))
            crop = views.crop(int(view), int(slot), *whole.size)
            left, top, width, height = crop.box
            expected = whole.crop((left, top, left + width, top + height)).resize(crop.size, resample)
            if crop.flip:
                expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            off = np.abs(image.permute(1, 2, 0).numpy().astype(np.int16) - np.asarray(expected, dtype=np.int16))
            sums.append(float(off.mean()))
            largest = max(largest, int(off.max()))
    return {"mean": float(np.mean(sums)), "max": largest, "images": len(sums)}


def _torchvision(root: Path, source: ImageSource, interpolation: str, passes: int) -> Run:
    import torch
    from torchvision import datasets, transforms

    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.RandomResizedCrop(_SIZE, interpolation=mode), transforms.RandomHorizontalFlip()]
    dataset = datasets.ImageFolder(str(root), transforms.Compose([*steps, transforms.PILToTensor()]))
    dataset.samples = [(source.path(i), int(source.labels[i])) for i in range(len(source))]  # the same files
    loader = torch.utils.data.DataLoader(
        dataset, _BATCH, shuffle=True, num_workers=_WORKERS, drop_last=True, persistent_workers=True
    )

    def run() -> int:
        return sum(len(images) for _ in range(passes) for images, _ in loader)

    return run


def _dali(source: ImageSource, interpolation: str, passes: int) -> Run:
    """DALI's own reader, shuffle and random crop: which views come when cannot be said, or made again."""
    from nvidia.dali import fn, pipeline_def, types

    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    files = [source.path(i) for i in range(len(source))]

    @pipeline_def(batch_size=_BATCH, num_threads=_WORKERS, device_id=None, seed=0)
    def graph() -> Any:
        encoded, labels = fn.readers.file(files=files, labels=source.labels.tolist(), random_shuffle=True)
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, resize_x=_SIZE, resize_y=_SIZE, interp_type=kind, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipeline = graph()
    pipeline.build()
    batches = passes * (len(source) // _BATCH)

    def run() -> int:
        return sum(len(pipeline.run()[0]) for _ in range(batches))

    return run


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values)}


def _versions() -> dict[str, str]:
    import nvidia.dali
    import torchvision

    return {"dali": nvidia.dali.__version__, "pillow": pillow_version, "torchvision": torchvision.__version__}
