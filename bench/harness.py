"""Interleaved rounds: every candidate once per round, so that a busy machine slows all of them alike.

pytest-benchmark times one function after another; the ratios that count are computed here and stored with its
result, in ``extra_info``.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["interleave", "machine", "ratios"]


def interleave(candidates: dict[str, Callable[[], Any]], *, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one sample a round; the order rotates from round to round."""
    names = list(candidates)
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - begin)
    return times


def ratios(times: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """For every other candidate: ratio of medians to ours, and the quartiles of the per-round ratios."""
    result = {}
    for name, samples in times.items():
        if name != ours:
            per_round = [a / b for a, b in zip(samples, times[ours], strict=True)]
            low, _, high = statistics.quantiles(per_round, n=4)
            median = statistics.median(samples) / statistics.median(times[ours])
            result[name] = {"ratio": median, "quartile_low": low, "quartile_high": high}
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    # With glibc's default, large temporaries are mapped and unmapped at each call; that slows whoever makes more of them.
    malloc = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda_device": device,
        "malloc": malloc or "default",
    }
