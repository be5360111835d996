"""RSD loss and gradient against the literal D×D formulation and the floor of its two matrix products.

pytest bench/bench_rsd.py --benchmark-json=bench/results/cpu/rsd.json
"""

from __future__ import annotations

import statistics

import pytest
import torch
from cases import RSD_CASES, RSDCase
from harness import interleave, machine, ratios
from rivals import gemm_floor, literal

import xdfast

#: What the Foundation promises on a CPU: at least this many times faster than the literal formulation.
TARGETS = {(128, 768): 10.0, (128, 2048): 50.0, (256, 4096): 60.0}


@pytest.mark.parametrize("case", RSD_CASES, ids=str)
def bench_rsd_cpu(benchmark, case: RSDCase) -> None:
    student, teacher = case.inputs()
    criterion = xdfast.RSDLoss()

    def step(loss):
        def run() -> None:
            student.grad = None
            loss(student, teacher).backward()

        return run

    def plain() -> None:
        with xdfast.backend("torch"):
            step(criterion)()

    # No speed of a wrong result: the gate comes first.
    for loss in (criterion, literal):
        step(loss)()
        gradient = student.grad.clone()
        student.grad = None
        wanted = torch.autograd.grad(literal(student.double(), teacher.double()), student)[0]
        assert ((gradient - wanted).norm() / wanted.norm()) < 1e-5

    detached = student.detach()
    candidates = {
        "xdfast": step(criterion),
        "xdfast-torch": plain,
        "literal": step(literal),
        "gemm-floor": lambda: gemm_floor(teacher, detached),
    }
    times = interleave(candidates, rounds=40 if case.d <= 1024 else 25)
    found = ratios(times, "xdfast")
    chosen = next(r.backend for r in xdfast.ops.explain(["cpu"])[0].rungs if r.chosen)
    benchmark.extra_info.update(
        machine=machine(),
        backend=chosen,
        median_ms={name: statistics.median(samples) * 1e3 for name, samples in times.items()},
        speedup_over_literal=found["literal"],
        plain_torch_over_ours=found["xdfast-torch"],
        times_gemm_floor=1 / found["gemm-floor"]["ratio"],
        gflops=case.flops / 1e9,
        megabytes=case.bytes / 1e6,
        target=TARGETS.get((case.n, case.d)),
    )
    benchmark.pedantic(candidates["xdfast"], rounds=20, iterations=1, warmup_rounds=2)
