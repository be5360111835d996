"""A training step of a routed stack that computes the active share alone, against the dense one."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import routed_rivals as rivals
from .harness import interleave, peak_memory, ratios
from .routed import OURS, TRAIN_MUST_REACH, describe
from .routed_cases import RoutedCase, build

__all__ = ["measure_training", "training_steps"]


def training_steps(case: RoutedCase, device: str = "cpu", *, compiled: bool = True) -> dict[str, Callable[[], Any]]:
    """Forward and backward of a sum, gradients of all parameters and, where there are gates, of the gates."""
    stack, x = build(case, device), case.input(device)
    parameters = list(stack.parameters())
    plain = rivals.dense(stack)

    def step(forward: Callable[[], Tensor], gates: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward().float().square().sum(), parameters + gates, allow_unused=True)

    timed = {"eager": step(lambda: plain(x), [])}
    if compiled:
        fast = rivals.compiled_dense(stack, x)
        timed["compiled"] = step(lambda: fast(x), [])
    ours, masked = rivals.xdfast_stack(stack, "auto"), rivals.mask_multiply(stack)
    for share in case.shares:
        gates = case.gates_at(share, device)[0].requires_grad_()
        timed[f"{OURS} @ {share:g}"] = step(lambda gates=gates: ours(x, gates), [gates])
        if share == case.middle:
            timed[f"mask-multiply @ {share:g}"] = step(lambda gates=gates: masked(x, gates), [gates])
    return timed


def measure_training(
    case: RoutedCase, *, device: str = "cpu", budget: float = 20.0, compiled: bool = True
) -> dict[str, Any]:
    """As :func:`xdfast.bench.routed.measure`, for steps; explored units (5 % of the inactive ones) are part of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        timed = training_steps(case, device, compiled=compiled)
        times = interleave(timed, budget=budget, rounds=(5, 60), device=device)
        memory = {name: peak_memory(step, device) / 1e6 for name, step in timed.items()}
    rows = []
    for share in case.shares:
        end = f" @ {share:g}"
        named = {n.removesuffix(end): t for n, t in times.items() if n in ("eager", "compiled") or n.endswith(end)}
        speedup = ratios(named, OURS)
        rows.append(
            {
                "share": share,
                "realised": float(case.gates_at(share)[0].mean()),
                "ours": OURS,
                "median_ms": statistics.median(times[OURS + end]) * 1e3,
                "speedup": speedup,
                "ideal": 1 / share if share else None,
                "fraction_of_ideal": speedup["eager"]["ratio"] * share,
            }
        )
    promised = device == "cpu" and case.batch == 16 and case.dtype == "float32"
    met = [
        {"share": 0.5, "rival": "eager", "figure": row["speedup"]["eager"]["ratio"], "target": TRAIN_MUST_REACH,
         "met": row["speedup"]["eager"]["ratio"] >= TRAIN_MUST_REACH}
        for row in rows if promised and row["share"] == 0.5
    ]  # fmt: skip
    return {
        **describe(case, device, len(times["eager"])),
        "median_ms": {name: statistics.median(samples) * 1e3 for name, samples in times.items()},
        "shares": rows,
        "peak_mb": {name.partition(" @ ")[0]: value for name, value in memory.items()},
        "targets": met,
    }
