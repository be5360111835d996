"""The planner of routed layers, run by Triton's interpreter on the CPU, against its definition (fixture ``interpreter``)."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import xdfast.kernels

pytestmark = pytest.mark.skipif(not xdfast.kernels.HAS_TRITON, reason=xdfast.kernels.WHY_NOT or "-")

GARBAGE = -123456789


def buffers(units: int, layers: int, branches: int, samples: int, device: str = "cpu") -> list[Tensor]:
    """gate, index, count, offsets, invalid, full of what nobody should see."""
    shapes = ((units,), (units,), (), (samples + 1,), ())
    made = [torch.full((layers, branches, *shape), GARBAGE, dtype=torch.int32, device=device) for shape in shapes]
    made[0] = torch.full(made[0].shape, float("nan"), device=device)
    return made


def check(out: list[Tensor], gates: Tensor, force, threshold: float, hard: bool, rows_per_unit: int, samples: int):
    gate, index, count, offsets, invalid = out
    units, layers, branches = gates.shape
    for layer in range(layers):
        for branch in range(branches):
            values = [float(g) for g in gates[:, layer, branch].float()]
            limit = float(torch.tensor(threshold))  # in fp32, as the gates
            active = [g > limit for g in values]
            forced = [bool(f) for f in force[:, layer, branch]] if force is not None else [False] * units
            listed = [u for u in range(units) if active[u] or forced[u]]
            assert count[layer, branch] == len(listed)
            assert index[layer, branch, : len(listed)].tolist() == listed
            assert (index[layer, branch, len(listed) :] == GARBAGE).all()
            want = [float(active[u]) if hard else values[u] if u in listed else 0.0 for u in range(units)]
            torch.testing.assert_close(gate[layer, branch], torch.tensor(want), rtol=0, atol=0, equal_nan=True)
            rows = [0]
            for sample in range(samples):
                own = range(sample * (units // samples), (sample + 1) * (units // samples))
                rows.append(rows[-1] + rows_per_unit * sum(u in listed for u in own))
            assert offsets[layer, branch].tolist() == rows
            assert invalid[layer, branch] == sum(not 0 <= g <= 1 for g in values)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    samples=st.integers(1, 7),
    per_sample=st.integers(1, 40),
    layers=st.integers(1, 3),
    branches=st.integers(1, 2),
    forced=st.booleans(),
    hard=st.booleans(),
    threshold=st.sampled_from([0.5, 0.3, -1.0, 2.0]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    layout=st.sampled_from(["contiguous", "layers first", "spread"]),
    bad=st.lists(st.sampled_from([float("nan"), float("inf"), -0.25, 1.5]), max_size=3),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(
    interpreter, samples, per_sample, layers, branches, forced, hard, threshold, dtype, layout, bad, seed
):
    generator = torch.Generator().manual_seed(seed)
    units = samples * per_sample
    gates = torch.rand(units, layers, branches, generator=generator)
    gates.flatten()[: len(bad)] = torch.tensor(bad[: gates.numel()])
    gates = gates.to(getattr(torch, dtype))
    force = torch.rand(gates.shape, generator=generator) < 0.2 if forced else None
    if layout == "layers first":
        gates = gates.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "spread":
        wide = torch.full((2 * units, layers, 3 * branches), float("nan"), dtype=gates.dtype)
        wide[::2, :, ::3] = gates
        gates = wide[::2, :, ::3]
        force = force if force is None else force.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    options = (threshold, hard, 3, samples)
    got = interpreter("route_plan.route_plan", gates, force, *options, *buffers(units, layers, branches, samples))
    assert got.launches == ["route_plan_kernel"]
    assert set(got.operators) <= {"view", "detach"}
    check(got.outputs[0][6:], gates, force, *options)


@pytest.mark.parametrize("units", [127, 128, 129, 1024, 1025, 2500])
@pytest.mark.parametrize("fill", ["some", "none", "all"])
def test_more_units_than_a_chunk(interpreter, units, fill):
    gates = torch.rand(units, 2, 1, generator=torch.Generator().manual_seed(units))
    gates = {"some": gates, "none": gates * 0, "all": gates * 0 + 1}[fill]
    got = interpreter("route_plan.route_plan", gates, None, 0.5, False, 1, 1, *buffers(units, 2, 1, 1))
    check(got.outputs[0][6:], gates, None, 0.5, False, 1, 1)


def test_a_gate_at_the_threshold_is_inactive(interpreter):
    gates = torch.tensor([0.3, 0.30000001, 0.3000001, 0.29999998]).reshape(4, 1, 1)
    got = interpreter("route_plan.route_plan", gates, None, 0.3, True, 1, 2, *buffers(4, 1, 1, 2))
    assert got.outputs[0][7][0, 0, 0] == 2 and got.outputs[0][8] == 1


def _by_triton(*args) -> None:
    from xdfast.kernels.route_plan import route_plan

    route_plan(*args)


def _by_extension(*args) -> None:
    torch.ops.xdfast_c.route_plan_(*args)


def _no_cuda_extension() -> bool:
    if importlib.util.find_spec("xdfast._C") is None:
        return True
    importlib.import_module("xdfast._C")
    return not torch._C._dispatch_has_kernel_for_dispatch_key("xdfast_c::route_plan_", "CUDA")


without = pytest.mark.skipif(_no_cuda_extension(), reason="the extension was built without CUDA kernels")


@pytest.mark.gpu
@pytest.mark.parametrize("by", [_by_triton, pytest.param(_by_extension, marks=without)])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("shape", [(16, 24, 2), (16 * 197, 12, 1), (5, 1, 1), (256, 3, 1), (257, 2, 2)])
def test_equals_the_definition_on_the_gpu(shape, hard, by):
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    gates.flatten()[3] = float("nan")
    force = torch.rand(shape) < 0.1
    for forced in (force, None):
        out = buffers(*shape, samples=shape[0], device="cuda")
        by(gates.cuda(), None if forced is None else forced.cuda(), 0.5, hard, 4, shape[0], *out)
        check([x.cpu() for x in out], gates, forced, 0.5, hard, 4, shape[0])
