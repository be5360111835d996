"""Routed stacks on a CUDA device: executors agree, ``list`` never waits and can be captured (`make test-gpu`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_routed import B, D, L, T, blocks, hard_gates, stack_of

pytestmark = pytest.mark.gpu


def on_gpu(dtype: torch.dtype = torch.bfloat16, **options):
    return stack_of(blocks(), **options).to("cuda", dtype), torch.randn(B, T, D, device="cuda").to(dtype)


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def run(stack, executor: str, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
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


def test_the_list_executor_never_waits_and_planned_waits_once() -> None:
    stack, x = on_gpu()
    gates = hard_gates(B).cuda()
    for _ in range(2):
        run(stack, "list", x, gates)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(stack, "list", x, gates)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def test_one_sample_by_its_path_of_graphs() -> None:
    stack, x = on_gpu()
    one = x[:1].contiguous()
    for _ in range(4):
        gates = (torch.rand(1, L, 1, device="cuda") > 0.5).float()
        assert error(run(stack, "graph", one, gates), run(stack, "dense_mask", one, gates)) < 3e-2
    with torch.no_grad():
        stack.get_parameter("1.mlp.fc1.weight").mul_(2)
    gates = torch.ones(1, L, 1, device="cuda")
    assert error(run(stack, "graph", one, gates), run(stack, "dense_mask", one, gates)) < 3e-2
    with pytest.raises(ValueError, match="one sample at a time"):
        run(stack, "graph", x, hard_gates(B).cuda())


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
