"""Thresholds for a latency budget: bisection over FLOP targets, each judged by what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from xdfast.nn.calibrate import SCOPES, Calibration, calibrate_checked, checked
from xdfast.ops._checks import check_choice, check_number
from xdfast.ops._costs import Costs

__all__ = ["LatencyCalibration", "LatencyMeasurement", "calibrate_latency"]


@dataclass(frozen=True)
class LatencyMeasurement:
    """One candidate, timed in turns with the dense path.

    Attributes:
        target_flops: the candidate's target.
        expected_flops: what it costs on the calibration data.
        ms: its median.
        dense_ms: median of the dense path in the same rounds: tells a slow candidate from a busy machine.
        confirmation: a second look at a candidate that had been within the budget.
    """

    target_flops: float
    expected_flops: float
    ms: float
    dense_ms: float
    confirmation: bool = False


@dataclass(frozen=True, eq=False)
class LatencyCalibration:
    """What :func:`calibrate_latency` chose, and everything it measured.

    Attributes:
        calibration: the choice, as of :func:`xdfast.nn.calibrate_flops`.
        budget_ms: what was asked for.
        ms: median of the confirming rounds, within the budget.
        dense_ms: median of the dense path in the same rounds.
        measurements: all, in the order they were made.
    """

    calibration: Calibration
    budget_ms: float
    ms: float
    dense_ms: float
    measurements: tuple[LatencyMeasurement, ...]


def calibrate_latency(
    probabilities: Tensor,
    costs: Costs,
    budget_ms: float,
    measure: Callable[[Calibration], float],
    *,
    always_on: Sequence[int] = (),
    scope: str = "global",
    repeats: int = 9,
    warmup: int = 2,
    steps: int = 8,
) -> LatencyCalibration:
    """The most FLOPs whose measured time is within a budget.

    FLOPs order the candidates, a clock judges them. Bisection keeps a candidate whose median was within the budget and
    one whose median was not; no assumption that more FLOPs take longer enters the result, which is always one that was
    measured within the budget. Of many noisy candidates the luckiest would win: so the winner runs again, and if it
    fails, the next cheaper one that had passed. Each candidate runs in turns with the dense path (everything on), first and
    second alternating, so that a machine that slows down shows.

    Args:
        probabilities: as of :func:`xdfast.nn.calibrate_flops`, which makes the candidates.
        costs: FLOPs (in any unit) of each branch.
        budget_ms: milliseconds, > 0.
        measure: runs the student once and returns the seconds: a function of a :class:`xdfast.nn.Calibration`, whose
            ``threshold`` (or ``select``) decides what runs. It waits for the GPU itself, and should measure data like
            those of the calibration. The dense path is a calibration with threshold 0 and all layers always on.
        always_on: layers that are never skipped, negative from the end.
        scope: ``"global"``, ``"branch"`` or ``"sample"``, see :func:`xdfast.nn.calibrate_flops`.
        repeats: rounds per candidate, ≥ 1; their median counts.
        warmup: rounds before, not counted.
        steps: of bisection; the result is within 2^-steps of the largest target (of FLOPs) that a noiseless clock allows.

    Shape:
        probabilities [N, L, S] or [N, L]; costs [L, S] or [L].

    Raises:
        ValueError: even the cheapest path is above the budget (both figures are named); bad options; a measured time that
            is not finite and > 0; see :func:`xdfast.nn.calibrate_flops` for probabilities and costs.

    Example:
        >>> import torch
        >>> p = torch.rand(64, 12, generator=torch.Generator().manual_seed(0))
        >>> found = calibrate_latency(p, [1.0] * 12, 5.0, lambda c: 1e-3 + 8e-3 * c.expected_flops)  # a model of a clock
        >>> round(found.ms, 1), round(found.dense_ms, 1), round(found.calibration.expected_flops, 2)
        (5.0, 9.0, 0.5)
    """
    budget_ms = check_number("budget_ms", budget_ms, minimum=0, strict=True)
    check_choice("scope", scope, SCOPES)
    for name, count, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("steps", steps, 0)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be an integer ≥ {least}, got {count!r}")
    p, table, on = checked(probabilities, costs, always_on)
    everything = tuple(range(len(table)))
    dense = Calibration(0.0, 1.0, 1.0, 1.0, torch.ones_like(table), "global", everything, table)
    made: list[LatencyMeasurement] = []

    def look(candidate: Calibration, confirmation: bool = False) -> LatencyMeasurement:
        ms, dense_ms = _in_turns(measure, candidate, dense, repeats, warmup)
        made.append(LatencyMeasurement(candidate.target_flops, candidate.expected_flops, ms, dense_ms, confirmation))
        return made[-1]

    low, high = float(table[list(on)].sum() / table.sum()), 1.0
    cheapest, whole = (calibrate_checked(p, table, on, target, scope) for target in (low, high))
    first = look(cheapest)
    if first.ms > budget_ms:
        raise ValueError(_too_slow(first, budget_ms))
    passed = [cheapest]
    if whole.expected_flops > cheapest.expected_flops and look(whole).ms <= budget_ms:
        passed.append(whole)
        steps = 0
    verdicts = {cheapest.expected_flops: True, whole.expected_flops: len(passed) == 2}
    for _ in range(steps):
        middle = (low + high) / 2
        candidate = calibrate_checked(p, table, on, middle, scope)
        if candidate.expected_flops not in verdicts:  # two targets between the same two probabilities are one candidate
            verdicts[candidate.expected_flops] = look(candidate).ms <= budget_ms
            if verdicts[candidate.expected_flops]:
                passed.append(candidate)
        low, high = (middle, high) if verdicts[candidate.expected_flops] else (low, middle)
    for candidate in sorted(passed, key=lambda c: c.expected_flops, reverse=True):
        again = look(candidate, confirmation=True)
        if again.ms <= budget_ms:
            return LatencyCalibration(candidate, budget_ms, again.ms, again.dense_ms, tuple(made))
    raise ValueError(_too_slow(made[-1], budget_ms))


def _in_turns(
    measure: Callable[[Calibration], float], candidate: Calibration, dense: Calibration, repeats: int, warmup: int
) -> tuple[float, float]:
    """Medians in milliseconds of the candidate and the dense path."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(warmup + repeats):
        for is_candidate in (True, False) if turn % 2 else (False, True):
            seconds = float(measure(candidate if is_candidate else dense))
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"measure must return the seconds of a run, finite and > 0, got {seconds!r}")
            if turn >= warmup:
                times[is_candidate].append(1e3 * seconds)
    return median(times[True]), median(times[False])


def _too_slow(cheapest: LatencyMeasurement, budget_ms: float) -> str:
    return (
        f"the cheapest path, {cheapest.expected_flops:.1%} of the routed FLOPs, takes {cheapest.ms:.3f} ms (the dense one "
        f"{cheapest.dense_ms:.3f} ms in the same rounds), above budget_ms={budget_ms:g}; raise the budget, leave fewer layers "
        "always on, or make faster what is not routed"
    )
