"""Measured speed: models timed side by side, in turns, on one machine. Nothing here is counted."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdfast.reporting.adapt import (
    check_size,
    device_name,
    eval_mode,
    example_images,
    model_dtype,
    network,
    out_of_memory,
    own_image_size,
    run_once,
)
from xdfast.reporting.memory import CPU_METHOD, CUDA_METHOD, activation_bytes, parameter_bytes

__all__ = ["SpeedRow", "SpeedTable", "compare_speed", "ratio_interval"]

_LEAST_ROUNDS = 3
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SpeedRow:
    """One model at one batch size.

    Attributes:
        p50_ms, p95_ms: latency of one forward pass of the whole batch, in milliseconds.
        min_ms: the fastest sample; far below p50, it tells of a machine that was busy with other work.
        images_per_s: batch_size / p50.
        speedup: median of the baseline / median of this model, over the same rounds; None without a baseline.
        speedup_low, speedup_high: 95 % bootstrap interval of it over rounds.
        activation_bytes: peak of one forward pass beside weights and input.
        parameter_bytes: weights and buffers.
        rounds: samples the figures are from.
        calls: forward passes averaged in one sample (more than one only for very short ones).
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str
    min_ms: float
    p50_ms: float
    p95_ms: float
    images_per_s: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    activation_bytes: int
    parameter_bytes: int
    rounds: int
    calls: int


@dataclass
class SpeedTable:
    """What :func:`compare_speed` measured, and where.

    Attributes:
        rows: one per model and batch size.
        baseline: name of the model the speedups are over.
        device, device_name, threads, torch_version, amp: where and how.
        memory_method: how peak activation memory was measured.
        load: others' work on the machine before the measurement, in processors (1 min average); None if unknown.
        skipped: what was not measured, and why.
    """

    rows: list[SpeedRow]
    baseline: str | None
    device: str
    device_name: str
    threads: int
    torch_version: str
    amp: str | None
    memory_method: str
    load: float | None = None
    skipped: list[str] = field(default_factory=list)

    def row(self, model: str, batch_size: int) -> SpeedRow | None:
        """The row of a model at a batch size, None if it was not measured."""
        return next((r for r in self.rows if r.model == model and r.batch_size == batch_size), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare_speed(
    models: Mapping[str, nn.Module],
    image_sizes: Mapping[str, int] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    device: str | torch.device = "cpu",
    baseline: str | None = None,
    *,
    rounds: int | None = None,
    min_time: float = 1e-3,
    amp: str | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> SpeedTable:
    """Times models against each other: in every round each model runs once, in a new random order.

    So a machine that slows down or is shared slows all of them, and the ratio of paired rounds stays fair. Only the
    network runs, on images already resized and normalised. On CUDA, events time the stream (gaps between kernels
    included); on the CPU, the clock.

    Args:
        models: name → model; of a wrapper with ``.net`` and ``.prepare`` the network alone.
        image_sizes: name → side of the square input in pixels; default: each model's own.
        batch_sizes: images per forward pass.
        device: "cpu", "cuda", "cuda:1". The models are moved there, and back afterwards.
        baseline: name of the model that speedups are over; None for no speedups.
        rounds: samples per model; default: as many as fit into ``seconds``, between 3 and 200.
        min_time: seconds one sample lasts at least; shorter passes are averaged over several calls.
        amp: None, "bf16" or "fp16" (autocast).
        seconds: rough limit of everything together. A batch whose three rounds would not fit is left out and listed
            in ``skipped``; the smallest batch is always measured.
        seed: of the order and the bootstrap.
        progress: called with (what is done now, share done in [0, 1]).

    Returns:
        :class:`SpeedTable`. Models are left in the mode and on the device they were on.

    Raises:
        ValueError: no models, an unknown baseline or size name, a bad number, or a size that a model cannot take.
        RuntimeError: a CUDA device that is not there.
    """
    _check(models, image_sizes or {}, batch_sizes, baseline, rounds, min_time, amp, seconds)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device={str(device)!r}, but torch sees no CUDA device here; use device='cpu'")
    sizes = {name: (image_sizes or {}).get(name, own_image_size(model)) for name, model in models.items()}
    nets = {name: network(model) for name, model in models.items()}
    homes = {name: next((p.device for p in net.parameters()), place) for name, net in nets.items()}
    tell = progress or (lambda what, share: None)
    table = SpeedTable(
        rows=[],
        baseline=baseline,
        device=str(place),
        device_name=device_name(place),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        amp=amp,
        memory_method=CUDA_METHOD if place.type == "cuda" else CPU_METHOD,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )
    batches = sorted(set(batch_sizes))
    deadline = time.perf_counter() + seconds
    modes = [eval_mode(net) for net in nets.values()]
    for mode in modes:
        mode.__enter__()
    try:
        for net in nets.values():
            net.to(place)
        per_image: dict[str, float] = {}
        for i, batch in enumerate(batches):
            tell(f"batch {batch}", i / len(batches))
            limit = (deadline - time.perf_counter()) / (len(batches) - i)
            chosen = _affordable(nets, batch, per_image, limit, table) if i else list(nets)
            if not chosen:
                continue
            try:
                turn = _Turn({n: nets[n] for n in chosen}, sizes, batch, place, amp, min_time)
                share = deadline - (len(batches) - i - 1) * max(limit, 0)
                samples = turn.run(rounds, share, seed, partial(_tell, tell, f"batch {batch}", i, len(batches)))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                table.skipped.append(f"{', '.join(chosen)} at batch {batch}: out of memory on {table.device_name}")
            else:
                per_image.update({n: float(np.median(v)) / batch for n, v in samples.items()})
                table.rows += turn.rows(samples, baseline, seed)
        tell("done", 1.0)
    finally:
        for name, net in nets.items():
            net.to(homes[name])
        for mode in modes:
            mode.__exit__(None, None, None)
    return table


def _tell(tell: Callable[[str, float], None], what: str, done: int, of: int, share: float) -> None:
    tell(what, (done + share) / of)


class _Turn:
    """All models at one batch size."""

    def __init__(
        self,
        nets: dict[str, nn.Module],
        sizes: dict[str, int],
        batch: int,
        place: torch.device,
        amp: str | None,
        min_time: float,
    ) -> None:
        self.nets, self.sizes, self.batch, self.place, self.amp = nets, sizes, batch, place, amp
        self.images: dict[str, Tensor] = {}
        self.memory: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        for name, net in nets.items():
            images = self.images[name] = example_images(net, sizes[name], batch, place)
            with torch.inference_mode(), self._autocast():
                run_once(name, net, (images,), sizes[name], own_image_size(net))  # warms up, and names a wrong size
                self.memory[name] = activation_bytes(net, images)
            once = self._sample(name, 1)
            self.calls[name] = max(1, round(min_time / max(once, 1e-9)))
        self.once = {name: self._sample(name, calls) * calls for name, calls in self.calls.items()}

    def run(self, rounds: int | None, until: float, seed: int, tell: Callable[[float], None]) -> dict[str, list[float]]:
        """Seconds per forward pass, name → one per round."""
        began = time.perf_counter()
        fitting = int((until - began) / max(sum(self.once.values()), 1e-9))
        target = rounds if rounds is not None else min(max(fitting, _LEAST_ROUNDS), 200)
        order = list(self.nets)
        shuffler = random.Random(seed)
        samples: dict[str, list[float]] = {name: [] for name in order}
        for done in range(target):
            if rounds is None and done >= _LEAST_ROUNDS and time.perf_counter() > until:
                break
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(self._sample(name, self.calls[name]))
            tell((done + 1) / target)
        return samples

    def rows(self, samples: dict[str, list[float]], baseline: str | None, seed: int) -> list[SpeedRow]:
        rows = []
        for name, seconds in samples.items():
            p50, p95 = (float(x) for x in np.percentile(seconds, (50, 95)))
            base = samples.get(baseline) if baseline else None
            ratio = ratio_interval(base, seconds, seed) if base else (None, None, None)
            rows.append(
                SpeedRow(
                    model=name,
                    batch_size=self.batch,
                    image_size=self.sizes[name],
                    dtype=str(model_dtype(self.nets[name])).removeprefix("torch."),
                    min_ms=min(seconds) * 1e3,
                    p50_ms=p50 * 1e3,
                    p95_ms=p95 * 1e3,
                    images_per_s=self.batch / p50,
                    speedup=ratio[0],
                    speedup_low=ratio[1],
                    speedup_high=ratio[2],
                    activation_bytes=self.memory[name],
                    parameter_bytes=parameter_bytes(self.nets[name]),
                    rounds=len(seconds),
                    calls=self.calls[name],
                )
            )
        return rows

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.place.type, dtype=_AMP[self.amp]) if self.amp else nullcontext()

    def _sample(self, name: str, calls: int) -> float:
        """Seconds per forward pass, averaged over ``calls`` of them."""
        net, images = self.nets[name], self.images[name]
        with torch.inference_mode(), self._autocast():
            if self.place.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(self.place)
                stream = torch.cuda.current_stream(self.place)  # of this device, which may not be the current one
                start.record(stream)
                for _ in range(calls):
                    net(images)
                end.record(stream)
                end.synchronize()
                return start.elapsed_time(end) / 1e3 / calls
            began = time.perf_counter()
            for _ in range(calls):
                net(images)
            return (time.perf_counter() - began) / calls


def ratio_interval(base: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """median(base) / median(other), and its 95 % percentile bootstrap interval over paired rounds (2,000 resamples)."""
    pairs = np.array([base, other], dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, pairs.shape[1], (2000, pairs.shape[1]))
    medians = np.median(pairs[:, picks], axis=2)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    center = np.median(pairs, axis=1)
    return float(center[0] / center[1]), float(low), float(high)


def _affordable(
    nets: dict[str, nn.Module], batch: int, per_image: dict[str, float], limit: float, table: SpeedTable
) -> list[str]:
    """Models whose warm-up and least rounds at this batch fit, cheapest first; the others are listed as skipped."""
    chosen, spent = [], 0.0
    for name in sorted(nets, key=lambda n: per_image.get(n, float("inf"))):
        # warm-up, memory, two calibrations, the rounds
        need = (_LEAST_ROUNDS + 4) * per_image[name] * batch if name in per_image else float("inf")
        if spent + need <= max(limit, 0.0):
            spent += need
            chosen.append(name)
        else:
            why = f"about {need:.0f} s would be needed" if name in per_image else "a smaller batch was not measured"
            table.skipped.append(
                f"{name} at batch {batch}: {why}, over the limit; raise seconds or use smaller batches"
            )
    return [name for name in nets if name in chosen]


def _check(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    batches: Sequence[int],
    baseline: str | None,
    rounds: int | None,
    min_time: float,
    amp: str | None,
    seconds: float,
) -> None:
    if not models:
        raise ValueError("compare_speed needs at least one model, as {name: model}")
    for name in (*sizes, *((baseline,) if baseline is not None else ())):
        if name not in models:
            raise ValueError(f"no model is called {name!r}; there are: {', '.join(models)}")
    for name, size in sizes.items():
        check_size(f"image_sizes[{name!r}]", size)
    if not batches:
        raise ValueError("batch_sizes must hold at least one size")
    for batch in batches:
        check_size("batch_sizes", batch)
    if rounds is not None:
        check_size("rounds", rounds)
    if amp is not None and amp not in _AMP:
        raise ValueError(f"amp must be None, 'bf16' or 'fp16', got {amp!r}")
    if not (min_time >= 0 and seconds > 0):
        raise ValueError(f"min_time must be ≥ 0 and seconds > 0, got {min_time!r} and {seconds!r}")
