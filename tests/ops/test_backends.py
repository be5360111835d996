"""The ladder: what runs, why, and that a forced backend is never replaced in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import xdfast
from xdfast.ops import _backends, _extension


def ladder(device: str = "cpu") -> dict[str, _backends.Rung]:
    report = next(r for r in xdfast.ops.explain([device]) if r.op == "rsd_loss")
    return {rung.backend: rung for rung in report.rungs}


def test_exactly_one_rung_is_chosen_and_every_rung_has_a_reason() -> None:
    for device in ("cpu", "cuda"):
        rungs = ladder(device).values()
        assert [rung.chosen for rung in rungs].count(True) == 1
        assert all(rung.reason for rung in rungs)


def test_forcing_and_restoring() -> None:
    before = ladder()
    with xdfast.backend("torch"):
        assert ladder()["torch"].chosen
        with xdfast.backend(None):
            assert ladder() == before
        assert ladder()["torch"].chosen
    assert ladder() == before


def test_unknown_backend_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown backend 'tritn'.*Did you mean 'triton'"), xdfast.backend("tritn"):
        pass


def test_a_forced_backend_that_cannot_run_is_an_error() -> None:
    with (
        xdfast.backend("triton"),
        pytest.raises(RuntimeError, match="'triton' was forced.*on cpu: .*CUDA tensors.*torch"),
    ):
        xdfast.rsd_loss(torch.randn(4, 5), torch.randn(4, 5))


def test_without_the_extension_plain_pytorch_runs_and_says_how_to_build(monkeypatch) -> None:
    _extension._load_extension.cache_clear()
    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: None)
    try:
        assert ladder()["torch"].chosen
        assert not ladder()["cpp"].available
        assert "--no-build-isolation" in ladder()["cpp"].reason
        assert torch.isfinite(xdfast.rsd_loss(torch.randn(4, 5), torch.randn(4, 5)))
    finally:
        _extension._load_extension.cache_clear()


def test_the_environment_variable_forces_a_backend() -> None:
    code = "import torch, xdfast; print([r.backend for r in xdfast.ops.explain(['cpu'])[0].rungs if r.chosen])"
    env = {**os.environ, "XDFAST_BACKEND": "torch"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['torch']"
    code = "import torch, xdfast; xdfast.rsd_loss(torch.randn(4, 5), torch.randn(4, 5))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**env, "XDFAST_BACKEND": "nonsense"}, capture_output=True, text=True
    )
    assert "unknown backend 'nonsense'" in run.stderr
