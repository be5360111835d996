"""The cross-correlation loss against its rivals and the floor of its matrix products; see xdfast.bench.rsd.

    pytest bench/bench_rsd.py --benchmark-json=bench/results/cpu/rsd.json

On a machine with a CUDA device the same cases run there too (``-k cuda``), in float32 and bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from xdfast.bench.cases import RSD_CASES, RSDCase
from xdfast.bench.harness import machine
from xdfast.bench.rsd import MUST_REACH, OURS, candidates, measure


def _run(benchmark, case: RSDCase, device: str, dtype: torch.dtype) -> None:
    found = measure(case, device=device, dtype=dtype)
    target = None if case.both or device != "cpu" else MUST_REACH.get((case.n, case.d))
    benchmark.extra_info.update(machine=machine(device), target=target, **found)
    student, teacher = case.inputs(dtype, device)
    timed, _ = candidates(case, student, teacher, compiled=False)
    benchmark.pedantic(timed[OURS], rounds=10, iterations=1, warmup_rounds=2)


@pytest.mark.timeout(1200)  # the literal loss at 1024 x 8192, compiled too, takes minutes without AVX-512
@pytest.mark.parametrize("case", RSD_CASES, ids=str)
def bench_rsd_cpu(benchmark, case: RSDCase) -> None:
    _run(benchmark, case, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RSD_CASES, ids=str)
def bench_rsd_cuda(benchmark, case: RSDCase, dtype: torch.dtype) -> None:
    _run(benchmark, case, "cuda", dtype)
