"""Interleaved rounds: every candidate once per round, so that a busy machine slows all of them alike.

pytest-benchmark times one function after another; the ratios that count are computed here and stored with its
result, in ``extra_info``.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["interleave", "machine", "peak_memory", "ratios"]


def interleave(
    candidates: dict[str, Callable[[], Any]],
    *,
    budget: float = 20.0,
    rounds: tuple[int, int] = (5, 60),
    warmup: int = 3,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one sample a round; every round has an order of its own.

    A candidate leaves the caches to the next one: in a fixed or rotating order one would always follow the same other.

    Args:
        candidates: name → what to time.
        budget: seconds that all rounds should take together.
        rounds: at least and at most so many, whatever the budget says.
        warmup: untimed calls of each candidate before the first round; a call that takes seconds gets one.
        device: with ``"cuda"`` each sample begins and ends with the device idle.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def once(name: str) -> float:
        wait()
        begin = time.perf_counter()
        candidates[name]()
        wait()
        return time.perf_counter() - begin

    names = list(candidates)
    total = 0.0
    for name in names:
        taken = [once(name)]
        while len(taken) < warmup and taken[-1] < 1.0:
            taken.append(once(name))
        total += taken[-1]
    count = max(rounds[0], min(rounds[1], int(budget / total)))
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(count):
        order.shuffle(names)
        for name in names:
            times[name].append(once(name))
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


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that ``function`` has allocated at its worst moment, beyond what there was before; kernels' scratch included.

    On the CPU from the allocator's events in torch's profiler, on CUDA from the caching allocator.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    # With glibc's default, large temporaries are mapped and unmapped at each call; that slows whoever makes more of them.
    malloc = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    found = {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "malloc": malloc or "default",
    }
    if device.startswith("cuda"):
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return found
