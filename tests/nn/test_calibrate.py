"""Calibration: exact against brute force, ties, budgets per branch and per sample, latency on a clock we know."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdfast.nn import GateFunction, calibrate_flops, calibrate_latency, select_per_sample


@st.composite
def problems(draw):
    """Probabilities in eighths (many ties), integer costs, a layer that may be always on, a target that is a fraction."""
    n, layers, branches = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    pairs = layers * branches
    p = draw(st.lists(st.integers(0, 8), min_size=n * pairs, max_size=n * pairs))
    costs = draw(st.lists(st.integers(0, 5), min_size=pairs, max_size=pairs).filter(sum))
    on = draw(st.sets(st.integers(0, layers - 1), max_size=1))
    fixed = sum(sum(costs[layer * branches : (layer + 1) * branches]) for layer in on)
    # a budget in FLOPs of the whole calibration set, exactly reachable or not
    spend = draw(st.integers(max(fixed * n, 1), sum(costs) * n))
    p = torch.tensor(p, dtype=torch.float32).reshape(n, layers, branches) / 8
    return p, torch.tensor(costs).reshape(layers, branches), tuple(on), Fraction(spend, sum(costs) * n)


def fraction(active: torch.Tensor, costs: torch.Tensor) -> Fraction:
    return Fraction(int((active * costs).sum()), int(costs.sum()) * len(active))


def above(p: torch.Tensor, threshold: float, on: tuple[int, ...]) -> torch.Tensor:
    active = p > threshold
    active[:, list(on)] = True
    return active


@settings(max_examples=150, deadline=None)
@given(problems())
def test_global_threshold_is_the_brute_force_one(problem) -> None:
    p, costs, on, target = problem
    found = calibrate_flops(p, costs, float(target), on)
    options = [above(p, threshold, on) for threshold in (0.0, 1.0, *p.flatten().tolist())]
    best = max((a for a in options if fraction(a, costs) <= target), key=lambda a: int(a.sum()))
    assert torch.equal(found.select(p), best)
    assert found.expected_flops == pytest.approx(float(fraction(best, costs)))
    assert 0 <= found.threshold <= 1


def test_the_gate_decides_what_the_calibration_chose() -> None:
    gate, logits = GateFunction("hard_st", tau=0.7).eval(), torch.randn(500, 12, 2) * 3
    for scope in ("global", "branch"):
        found = calibrate_flops(gate.probabilities(logits), torch.rand(12, 2), 0.37, always_on=(0,), scope=scope)
        gate.set(threshold=found.threshold)
        assert torch.equal(gate(logits)[:, 1:].bool(), found.select(gate.probabilities(logits))[:, 1:])
        assert 0.36 < found.expected_flops <= 0.37 + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems())
def test_every_sample_keeps_the_budget_by_the_greedy_rule(problem) -> None:
    p, costs, on, target = problem
    fixed = int(costs[list(on)].sum())
    found = calibrate_flops(p, costs, float(target), on, scope="sample")
    active = found.select(p)
    budget = target * int(costs.sum())
    for sample, chosen in zip(p, active):
        left, expected = budget - fixed, torch.zeros_like(chosen)
        expected[list(on)] = True
        where = [(layer, s) for layer, s in itertools.product(*map(range, costs.shape)) if layer not in on]
        density = {at: sample[at].item() / costs[at].item() if costs[at] else float("inf") for at in where}
        for at in sorted(where, key=density.get, reverse=True):
            if sample[at] > 0 and int(costs[at]) <= left:
                left, expected[at] = left - int(costs[at]), True
        assert torch.equal(chosen, expected)
    assert found.threshold is None
    assert found.worst_flops <= float(target) * (1 + 1e-9)


def test_equal_costs_per_sample_is_top_k() -> None:
    p = torch.rand(50, 12, 1)
    active = select_per_sample(p, [1.0] * 12, 5 / 12)
    expected = torch.zeros_like(active).scatter(1, p.topk(5, dim=1).indices, True)
    assert torch.equal(active, expected)


def test_per_branch_thresholds_use_every_branch_alike() -> None:
    # layers whose probabilities are not comparable: one between 0.9 and 1, one between 0 and 0.1
    p = torch.rand(1000, 4, 2) * 0.1 + torch.tensor([0.0, 0.3, 0.6, 0.9])[:, None]
    found = calibrate_flops(p, torch.ones(4, 2), 0.7, always_on=(0,), scope="branch")
    assert found.usage[0].tolist() == [1, 1]
    torch.testing.assert_close(found.usage[1:], torch.full((3, 2), 0.6, dtype=torch.double))
    assert found.expected_flops == pytest.approx(0.7)
    gate = GateFunction(threshold=found.threshold)
    assert gate.threshold.shape == (4, 2)
    assert torch.equal((p > gate.threshold)[:, 1:], found.select(p)[:, 1:])
    worst = calibrate_flops(p, torch.ones(4, 2), 0.7)
    assert worst.usage.min() == 0  # the global threshold never runs layer 0


@pytest.mark.parametrize("target", [0.58, 0.29, 0.07, 1.0])
def test_decimal_targets_are_met_to_the_last_pair(target) -> None:
    p = (torch.randperm(100).float() + 1).reshape(50, 2) / 128  # no ties
    assert calibrate_flops(p, [1, 1], target).expected_flops == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_lies_between_neighbours_even_of_one_ulp(dtype) -> None:
    low = torch.tensor(0.7, dtype=dtype)
    for _ in range(4):  # half-way is rounded up for one parity, down for the other
        high = torch.nextafter(low, torch.tensor(1.0, dtype=dtype))
        found = calibrate_flops(torch.stack([low, high])[:, None], [1.0], 0.5)
        assert found.select(torch.stack([low, high])[:, None, None]).flatten().tolist() == [False, True]
        if dtype == torch.float32:  # a gate's threshold is a float32 and must not be rounded to another
            assert GateFunction(threshold=found.threshold).threshold.item() == found.threshold
        low = high
    assert calibrate_flops(torch.tensor([[0.2], [0.6]]), [1.0], 0.5).threshold == pytest.approx(0.4)


def test_ties_run_together_or_not_at_all() -> None:
    p = torch.tensor([[0.9], [0.5], [0.5], [0.5]])
    found = calibrate_flops(p, [1.0], 0.75)
    assert found.expected_flops == 0.25
    assert calibrate_flops(torch.full((4, 1), 0.5), [1.0], 0.75).threshold == 1.0
    assert calibrate_flops(torch.full((4, 1), 0.5), [1.0], 1.0).expected_flops == 1.0
    assert calibrate_flops(torch.zeros(4, 1), [1.0], 1.0).expected_flops == 0.0


def test_half_precision_and_what_is_reported() -> None:
    p = torch.rand(64, 6, 1).bfloat16()
    found = calibrate_flops(p, [1.0] * 6, 0.5, always_on=(0, -1))
    assert found.always_on == (0, 5)
    assert found.usage[[0, 5]].flatten().tolist() == [1, 1]
    assert found.expected_flops == pytest.approx(found.usage.mean().item())
    assert found.expected_flops <= 0.5 <= found.worst_flops


class Clock:
    """A student whose time we know: a fixed part, one per FLOP, noise; a step where a cache is full."""

    def __init__(self, fixed: float, per_flop: float, noise: float = 0.0, step: float = 0.0) -> None:
        self.fixed, self.per_flop, self.noise, self.step = fixed, per_flop, noise, step
        self.make, self.calls = torch.Generator().manual_seed(0), []

    def truth(self, flops: float) -> float:
        return self.fixed + self.per_flop * flops - self.step * (flops > 0.4)

    def __call__(self, calibration) -> float:
        self.calls.append(calibration.expected_flops)
        return self.truth(calibration.expected_flops) * (1 + self.noise * torch.rand(1, generator=self.make).item())


@pytest.mark.parametrize("scope", ["global", "sample", "branch"])
def test_latency_finds_the_most_flops_within_the_budget(scope) -> None:
    p, clock = torch.rand(200, 20), Clock(1e-3, 8e-3)
    found = calibrate_latency(p, [1.0] * 20, 5.0, clock, always_on=(0,), scope=scope)
    assert found.ms <= 5.0
    assert found.calibration.expected_flops == pytest.approx(0.5, abs=0.051 if scope == "sample" else 0.01)
    assert found.dense_ms == pytest.approx(9.0)
    assert set(clock.calls) == {1.0, *(m.expected_flops for m in found.measurements)}
    # in turns, first and second alternating: no candidate runs more than twice between two dense runs
    dense = "".join("d" if flops == 1.0 else "c" for flops in clock.calls)
    assert "ccc" not in dense
    assert dense.startswith("dccddccd")
    assert found.measurements[-1].confirmation


def test_latency_under_noise_and_a_step_down_is_what_was_measured() -> None:
    p, clock = torch.rand(200, 20), Clock(1e-3, 8e-3, noise=0.1, step=2e-3)
    found = calibrate_latency(p, [1.0] * 20, 4.0, clock, repeats=5)
    assert found.ms <= 4.0
    last = found.measurements[-1]
    assert (last.confirmation, last.ms, last.expected_flops) == (True, found.ms, found.calibration.expected_flops)


def test_a_lucky_candidate_is_not_believed() -> None:
    p, seen = torch.rand(200, 20), set()

    def measure(calibration) -> float:  # every candidate above 30 % is fast once, and slow when asked again
        flops = calibration.expected_flops
        lucky = flops not in seen
        seen.add(flops)
        return 9e-3 if flops > 0.3 and not lucky else 1e-3

    found = calibrate_latency(p, [1.0] * 20, 5.0, measure, repeats=1, warmup=0)
    assert found.calibration.expected_flops <= 0.3
    assert next(m.ms for m in found.measurements if m.confirmation) == pytest.approx(9.0)


def test_a_dense_student_within_the_budget_stays_dense() -> None:
    found = calibrate_latency(torch.rand(10, 4).clamp(0.1, 0.9), [1.0] * 4, 100.0, Clock(1e-3, 8e-3))
    assert found.calibration.expected_flops == 1.0


def test_latency_of_a_real_run() -> None:
    x, weight = torch.randn(256, 256), torch.randn(256, 256)

    def measure(calibration) -> float:
        start = time.perf_counter()
        for _ in range(1 + round(20 * calibration.expected_flops)):
            x @ weight
        return time.perf_counter() - start

    dense = sorted(measure(calibrate_flops(torch.full((2, 10), 0.5), [1.0] * 10, 1.0)) for _ in range(9))[4]
    found = calibrate_latency(torch.rand(20, 10), [1.0] * 10, 1e3 * dense, measure, repeats=3, warmup=1, steps=3)
    assert found.ms <= found.budget_ms


def test_bad_input() -> None:
    p = torch.rand(4, 3, 2)
    for target in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="target_flops"):
            calibrate_flops(p, torch.ones(3, 2), target)
    with pytest.raises(ValueError, match=r"costs must have shape .* = \[3, 2\] or \[layers\], got \[2, 3\]"):
        calibrate_flops(p, torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match="not all zero"):
        calibrate_flops(p, torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match="cannot be reached"):
        calibrate_flops(p, torch.ones(3, 2), 0.5, always_on=(0, 1))
    with pytest.raises(ValueError, match="always_on names layers"):
        calibrate_flops(p, torch.ones(3, 2), 0.5, always_on=(3,))
    with pytest.raises(ValueError, match="always_on names layers"):
        select_per_sample(p, torch.ones(3, 2), 0.5, always_on=(-4,))
    with pytest.raises(ValueError, match=r"samples, layers, branches\], got \[4, 3\]"):
        select_per_sample(p[..., 0], torch.ones(3), 0.5)
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\].*gate.probabilities"):
        calibrate_flops(torch.randn(4, 3, 2), torch.ones(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\], got nan"):
        calibrate_flops(torch.full((4, 3, 2), float("nan")), torch.ones(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
        calibrate_flops(p[None], torch.ones(3, 2), 0.5)
    with pytest.raises(TypeError, match="floating-point tensor, got torch.bool"):
        calibrate_flops(p > 0.5, torch.ones(3, 2), 0.5)
    with pytest.raises(ValueError, match="scope must be one of .*got 'layer'"):
        calibrate_flops(p, torch.ones(3, 2), 0.5, scope="layer")


def test_bad_latency() -> None:
    p = torch.rand(10, 4)
    with pytest.raises(ValueError, match=r"takes 3.000 ms \(the dense one 9.000 ms .*above budget_ms=2"):
        calibrate_latency(p, [1.0] * 4, 2.0, Clock(1e-3, 8e-3), always_on=(0,))
    with pytest.raises(ValueError, match="budget_ms must be finite and > 0"):
        calibrate_latency(p, [1.0] * 4, 0, Clock(1e-3, 8e-3))
    with pytest.raises(ValueError, match="repeats must be an integer ≥ 1, got 0"):
        calibrate_latency(p, [1.0] * 4, 5, Clock(1e-3, 8e-3), repeats=0)
    with pytest.raises(ValueError, match="seconds of a run, finite and > 0, got nan"):
        calibrate_latency(p, [1.0] * 4, 5, lambda c: float("nan"))
