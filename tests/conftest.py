"""Shared fixtures: fixed seeds, fresh memory that is NaN, a backend to run under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A test means the same on every run: drawn cases are a function of the test. `make harden` draws many more;
# XDFAST_DRAW=random draws others each time, and keeps the one that failed.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("XDFAST_DRAW", "repeatable"))

sys.path.append(str(Path(__file__).parent))  # tests/tolerances.py; appended, so it shadows nothing


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")  # fixtures of a module ask for it, too: a sum in another order is another run
def one_thread() -> Iterator[None]:
    """Small models: a second thread gains nothing, and waits where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin return NaN, so that an op that reads memory it did not write is found out."""

    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    yield


def rsd_backends() -> list:
    """Backends of the RSD op that can run here on the CPU, the missing ones as skips with their reason."""
    import xdfast

    report = next(r for r in xdfast.ops.explain(["cpu"]) if r.op == "rsd_loss")
    return [
        pytest.param(rung.backend, marks=() if rung.available else pytest.mark.skip(reason=rung.reason))
        for rung in report.rungs
        if rung.backend != "triton"  # CUDA only; its kernel is tested in tests/kernels
    ]


@pytest.fixture(params=rsd_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test under every backend available on this machine's CPU."""
    import xdfast

    with xdfast.backend(request.param):
        yield request.param
