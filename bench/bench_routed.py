"""Routed stacks against dense ones and other ways to skip; see xdfast.bench.routed. `make bench-routed` writes figures.

    pytest bench/bench_routed.py --benchmark-json=routed.json

On a machine with a CUDA device: ``-m gpu -k cuda``, and first what a kernel and a replay of a graph cost there.
"""

from __future__ import annotations

import pytest
import torch

from xdfast.bench.harness import machine
from xdfast.bench.routed import measure
from xdfast.bench.routed_cases import RoutedCase, build, default_cases
from xdfast.bench.routed_cuda import graph_costs


def _run(benchmark, case: RoutedCase, device: str) -> None:
    found = measure(case, device=device)
    benchmark.extra_info.update(machine=machine(device), **found)
    stack, x = build(case, device), case.input(device)
    gates = case.gates_at(case.middle, device)[0]
    with torch.no_grad():
        benchmark.pedantic(lambda: stack(x, gates), rounds=10, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("case", default_cases("cpu"), ids=str)
def bench_routed_cpu(benchmark, case: RoutedCase) -> None:
    _run(benchmark, case, "cpu")


@pytest.mark.gpu
def bench_graph_costs_cuda(benchmark) -> None:
    benchmark.extra_info.update(machine=machine("cuda"), graph_costs=graph_costs())
    benchmark.pedantic(torch.cuda.synchronize, rounds=3, iterations=1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", default_cases("cuda"), ids=str)
def bench_routed_cuda(benchmark, case: RoutedCase) -> None:
    _run(benchmark, case, "cuda")
