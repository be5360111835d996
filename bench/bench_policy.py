"""Milliseconds of one decision of a diffusion policy; see xdfast.bench.policy.

make bench-policy
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("diffusers")

from xdfast.bench.harness import machine
from xdfast.bench.policy import MUST_REACH_MS, SIZES, measure


@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", list(SIZES))
def bench_decision_cpu(benchmark, size: str) -> None:
    load = os.getloadavg()[0]
    found = benchmark.pedantic(lambda: measure(size), rounds=1, iterations=1)
    target = {"target_ms": MUST_REACH_MS} if size == "small" else {}
    benchmark.extra_info.update(machine={**machine(), "load_before": load}, **target, **found)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("size", list(SIZES))
def bench_decision_cuda(benchmark, size: str, batch: int) -> None:
    found = benchmark.pedantic(lambda: measure(size, batch=batch, device="cuda"), rounds=1, iterations=1)
    benchmark.extra_info.update(machine=machine("cuda"), **found)
