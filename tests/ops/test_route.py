"""Plans: lists of active units against their definition, whatever the gates; bad gates and batches are told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_parts import routed_backends

import xdfast
from xdfast.ops import make_plan


@pytest.mark.parametrize("backend", routed_backends())
@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 5), per_sample=st.integers(1, 4), layers=st.integers(1, 4), branches=st.integers(1, 2),
    rows=st.integers(1, 6), threshold=st.sampled_from([0.0, 0.3, 0.5]), hard=st.booleans(), forced=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_plan_lists_what_is_above_the_threshold(
    backend, samples, per_sample, layers, branches, rows, threshold, hard, forced, dtype, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    units = samples * per_sample
    gates = torch.rand(units, layers, branches, generator=generator).mul(1.6).sub(0.3).clamp(0, 1).to(dtype)
    force = torch.rand(gates.shape, generator=generator) < 0.2 if forced else None
    with xdfast.backend(backend):
        plan = make_plan(gates, rows_per_unit=rows, samples=samples, threshold=threshold, hard=hard, force=force)
    assert (plan.num_layers, plan.branches, plan.units, plan.rows) == (layers, branches, units, units * rows)
    for layer in range(layers):
        for branch in range(branches):
            value = gates[:, layer, branch].float()
            on = value > threshold
            listed = on if force is None else on | force[:, layer, branch]
            ids = listed.nonzero()[:, 0]
            route = plan.of(layer, branch)
            assert route.units == len(ids) == int(route.count) and route.capacity == len(ids) * rows
            assert route.index.dtype == torch.int32 and route.index[: len(ids)].tolist() == ids.tolist()
            rows_of_samples = listed.unflatten(0, (samples, per_sample)).sum(1) * rows
            assert route.offsets.tolist() == [0, *rows_of_samples.cumsum(0).tolist()]
            expected = on.float() if hard else torch.where(listed, value, 0.0)
            assert torch.equal(plan.gate[layer, branch], expected)
            assert route.gate is None if plan.plain else torch.equal(route.gate, expected)
            assert plan.plain == (hard and not forced)


@pytest.mark.parametrize("backend", routed_backends())
def test_a_gate_at_the_threshold_is_off(backend) -> None:
    with xdfast.backend(backend):
        assert make_plan(torch.full((2, 1), 0.3), rows_per_unit=1, threshold=0.3).host_counts == ((0,),)


def test_gates_carry_their_gradient_and_their_exact_value() -> None:
    gates = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    plan = make_plan(gates, rows_per_unit=2)
    assert plan.of(1).gate.dtype == torch.float64 and not plan.plain
    plan.of(1).gate.sum().backward()
    assert torch.equal(gates.grad, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(6, 3))
    with torch.no_grad():
        assert make_plan(gates, rows_per_unit=2).plain


def test_a_plan_is_overwritten_in_place() -> None:
    first = make_plan(torch.ones(4, 2), rows_per_unit=3)
    addresses = [t.data_ptr() for t in (first.gate, first.index, first.count, first.offsets, first.invalid)]
    second = make_plan(torch.tensor([[0.0, 1.0]] * 4), rows_per_unit=3, out=first)
    assert [
        t.data_ptr() for t in (second.gate, second.index, second.count, second.offsets, second.invalid)
    ] == addresses
    assert second.host_counts == ((0,), (4,)) and second.active_fraction().tolist() == [[0.0], [1.0]]
    with pytest.raises(ValueError, match=r"another batch \(units 4 there, 5 given, .*\); make a new plan"):
        make_plan(torch.ones(5, 2), rows_per_unit=3, out=first)


@pytest.mark.parametrize("backend", routed_backends())
@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5, float("inf")])
def test_bad_gates_are_told_with_their_layer(backend, bad) -> None:
    gates = torch.rand(4, 3)
    gates[2, 1] = bad
    with xdfast.backend(backend), pytest.raises(ValueError, match="1 gates of layer 1 are NaN or outside"):
        make_plan(gates, rows_per_unit=2)


@pytest.mark.parametrize(
    ("gates", "options", "error", "message"),
    [
        (torch.ones(4, 2, dtype=torch.bool), {}, TypeError, "floating-point tensor .* got torch.bool"),
        ([[1.0]], {}, TypeError, "got list"),
        (torch.ones(4), {}, ValueError, r"\[units, layers\] .* got \[4\]"),
        (torch.ones(0, 2), {}, ValueError, r"got \[0, 2, 1\]"),
        (torch.ones(4, 2), {"rows_per_unit": 0}, ValueError, "4 units of 0 rows"),
        (torch.ones(4, 2), {"samples": 3}, ValueError, "cannot be dealt out to 3 samples"),
        (torch.ones(4, 2), {"threshold": 1.0}, ValueError, r"threshold must be in \[0, 1\), got 1.0"),
        (torch.ones(4, 2), {"force": torch.ones(4, 2)}, ValueError, "force must be bool"),
    ],
)
def test_what_cannot_be_planned_is_told(gates, options, error, message) -> None:
    with pytest.raises(error, match=message):
        make_plan(gates, **{"rows_per_unit": 2, **options})


def test_under_the_compiler_and_on_meta_tensors() -> None:
    def counts(gates: torch.Tensor) -> torch.Tensor:
        return make_plan(gates, rows_per_unit=2).count

    compiled = torch.compile(counts, fullgraph=True, backend="aot_eager")
    gates = torch.tensor([[1.0, 0.0], [0.7, 0.2]])
    assert torch.equal(compiled(gates), counts(gates))
    plan = make_plan(torch.ones(4, 2, device="meta"), rows_per_unit=2)
    assert plan.index.shape == (2, 1, 4) and plan.host_counts is None and plan.of(0).capacity == 8
