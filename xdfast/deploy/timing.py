"""Latency of exported files beside eager PyTorch: all in turns, in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.deploy.graph import Graph
from xdfast.reporting.speed import ratio_interval

__all__ = ["EAGER", "Timing", "measure_latency"]

#: The name of PyTorch without an export.
EAGER = "eager"

_WARM_UP, _LEAST, _MOST = 3, 5, 200


@dataclass(frozen=True)
class Timing:
    """One format at one batch size.

    Attributes:
        p50_ms, p95_ms: of one call, inputs and outputs in the device's memory.
        speedup, low, high: median of eager over this one, over the same rounds, with its 95 % bootstrap interval.
        rounds: calls that were timed.
    """

    name: str
    batch: int
    p50_ms: float
    p95_ms: float
    speedup: float
    low: float
    high: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_latency(
    graph: Graph,
    calls: Mapping[str, Callable[[tuple[Tensor, ...]], Any]],
    device: torch.device,
    *,
    batches: Sequence[int],
    seconds: float,
    seed: int = 0,
) -> list[Timing]:
    """Times eager and ``calls`` in random order, round by round, so that a busy machine slows all of them.

    Args:
        graph: with the eager module.
        calls: name → what was loaded.
        device: of the inputs.
        batches: sizes.
        seconds: for all sizes together, roughly; at least 5 rounds each.
        seed: of the order.
    """
    everyone: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {EAGER: graph.run_eager, **calls}
    shuffler, rows = random.Random(seed), []
    for batch in batches:
        inputs = graph.inputs_for(batch, device)
        for call in everyone.values():
            for _ in range(_WARM_UP):
                call(inputs)
        samples: dict[str, list[float]] = {name: [] for name in everyone}
        until, order = time.perf_counter() + seconds / len(batches), list(everyone)
        for done in range(_MOST):
            if done >= _LEAST and time.perf_counter() > until:
                break
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(_once(everyone[name], inputs, device))
        for name, taken in samples.items():
            p50, p95 = (1e3 * float(x) for x in np.percentile(taken, (50, 95)))
            rows.append(Timing(name, batch, p50, p95, *ratio_interval(samples[EAGER], taken, seed), len(taken)))
    return rows


def _once(call: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
