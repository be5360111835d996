"""Routed stacks on a CUDA device: executors agree, ``list`` never waits and can be captured (`make test-gpu`)."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from xdfast.nn import GateFunction, LayerRouter

sys.path.append(str(Path(__file__).parent))
from test_routed import B, D, L, T, blocks, hard_gates, stack_of

pytestmark = pytest.mark.gpu

CUDA = torch.profiler.ProfilerActivity.CUDA


def on_gpu(dtype: torch.dtype = torch.bfloat16, **options):
    return stack_of(blocks(), **options).to("cuda", dtype), torch.randn(B, T, D, device="cuda").to(dtype)


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def run(stack, executor: str, x: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    stack.executor = executor
    with torch.no_grad():
        return stack(x, gates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("unit", "units"), [("sample", B), ("token", B * T)])
@pytest.mark.parametrize("executor", ["planned", "list"])
def test_executors_agree_with_multiplied_masks(executor, unit, units, dtype) -> None:
    stack, x = on_gpu(dtype, unit=unit)
    gates = hard_gates(units).cuda()
    expected = run(stack, "dense_mask", x, gates)
    if dtype == torch.float32 and unit == "token":
        with pytest.raises(RuntimeError, match="samples of different lengths takes bfloat16 or float16"):
            run(stack, executor, x, gates)
        return
    assert error(run(stack, executor, x, gates), expected) < (1e-4 if dtype == torch.float32 else 3e-2)
    assert torch.equal(run(stack, executor, x, torch.zeros_like(gates)), x)


ROUTED = [
    {},
    {"always_on": (0, -1)},
    {"gate": GateFunction("soft", threshold=0.3)},
    {"gate": GateFunction("soft", threshold=[0.3, 0.4, 0.5, 0.6]), "always_on": (0,)},
]


@pytest.mark.parametrize("options", ROUTED, ids=["plain", "always on", "soft", "soft by layer"])
@pytest.mark.parametrize("routed", [False, True], ids=["given", "router"])
def test_the_list_executor_never_waits_and_planned_waits_once(options, routed) -> None:
    stack, x = on_gpu(router=LayerRouter(D, L, hidden=8) if routed else None, **copy.deepcopy(options))
    gates = None if routed else hard_gates(B).cuda()
    for executor, waits in (("list", 0), ("planned", 1)):
        for _ in range(2):
            run(stack, executor, x, gates)
        torch.cuda.set_sync_debug_mode("error")  # of whatever waits by the way: copies, values, nonzero
        try:
            run(stack, executor, x, gates)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, CUDA]) as profile:
            run(stack, executor, x, gates)
        names = [event.name for event in profile.events()]
        assert names.count("cudaEventSynchronize") == waits and "cudaStreamSynchronize" not in names


def test_weights_changed_before_a_capture_are_told() -> None:
    stack, x = on_gpu()
    gates = hard_gates(B).cuda()
    run(stack, "list", x, gates)
    with torch.no_grad():
        stack.get_parameter("1.mlp.fc1.weight").mul_(2)
    with (
        pytest.raises(RuntimeError, match="weights changed after they were folded"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        run(stack, "list", x, gates)
    expected = run(stack, "dense_mask", x, gates)
    assert error(run(stack, "list", x, gates), expected) < 3e-2
    for parameter in stack.parameters():
        parameter.data.mul_(1.5)  # which nobody can see without waiting
    stack.refold()
    assert error(run(stack, "list", x, gates), run(stack, "dense_mask", x, gates)) < 3e-2


def test_the_list_executor_multiplies_by_one_bit_for_bit() -> None:
    stack, x = on_gpu(torch.float32)
    gates, order = hard_gates(B).cuda(), torch.randperm(B, device="cuda")
    out = run(stack, "list", x, gates)
    assert torch.equal(run(stack, "list", x[order], gates[order]), out[order])
    everybody = torch.ones_like(gates)
    everybody[1:, 1] = gates[1:, 1]
    kept = gates.clone()
    kept[0] = 1
    assert torch.equal(run(stack, "list", x, everybody)[0], run(stack, "list", x, kept)[0])  # whoever else is listed
    stack.gate = GateFunction("soft").cuda()
    assert torch.equal(run(stack, "list", x, gates), out)


def test_a_captured_pass_follows_the_gates() -> None:
    stack, x = on_gpu()
    gates = hard_gates(B).cuda()
    for _ in range(2):
        run(stack, "list", x, gates)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(stack, "list", x, gates)
    for _ in range(3):
        gates.copy_(hard_gates(B))
        graph.replay()
        assert error(out, run(stack, "dense_mask", x, gates)) < 3e-2


@pytest.mark.parametrize("executor", ["graph", "switch"])
def test_one_sample_by_its_path_of_graphs(executor) -> None:
    stack, x = on_gpu()
    one = x[:1].contiguous()
    for _ in range(4):
        gates = (torch.rand(1, L, 1, device="cuda") > 0.5).float()
        assert error(run(stack, executor, one, gates), run(stack, "dense_mask", one, gates)) < 3e-2
    assert torch.equal(run(stack, executor, one, torch.zeros_like(gates)), one)
    with torch.no_grad():
        stack.get_parameter("1.mlp.fc1.weight").mul_(2)
    gates = torch.ones(1, L, 1, device="cuda")
    assert error(run(stack, executor, one, gates), run(stack, "dense_mask", one, gates)) < 3e-2
    with pytest.raises(ValueError, match=f"executor='{executor}' runs one sample at a time"):
        run(stack, executor, x, hard_gates(B).cuda())


def test_switched_and_replayed_paths_are_the_same_bits_in_any_order() -> None:
    stack, x = on_gpu()
    one = x[:1].contiguous()
    paths = [(torch.rand(1, L, 1, device="cuda") > 0.5).float() for _ in range(6)]
    replayed = [run(stack, "graph", one, gates) for gates in paths]
    for number in (0, 3, 3, 1, 5, 2, 4, 0):  # the same path twice in a row switches nothing
        assert torch.equal(run(stack, "switch", one, paths[number]), replayed[number])


def test_sparse_training_has_the_gradients_of_the_dense_one() -> None:
    stack, x = on_gpu(torch.float32, explore=0.0)
    stack.train()
    gates = hard_gates(B).cuda()
    parameters = list(stack.parameters())
    stack.executor = "auto"
    dense = torch.autograd.grad(stack(x, gates).square().sum(), parameters)
    stack.sparse_train = True
    sparse = torch.autograd.grad(stack(x, gates).square().sum(), parameters)
    assert stack.decision.executor == "planned"
    for mine, theirs in zip(sparse, dense, strict=True):
        assert error(mine, theirs) < 1e-3
