"""What can be said of switched CUDA graphs without a device; the rest is in test_routed_gpu.py."""

from __future__ import annotations

import sys

import pytest

from xdfast.nn.switched_graph import checked, cuda_runtime


def test_without_bindings_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(RuntimeError, match="pip install cuda-bindings .* or use executor='graph'"):
        cuda_runtime()


def test_the_bindings_have_the_calls_that_are_made() -> None:
    pytest.importorskip("cuda.bindings")
    runtime = cuda_runtime()
    for name in ("GetNodes", "NodeGetType", "NodeSetEnabled", "Instantiate", "Launch", "ExecDestroy"):
        assert callable(getattr(runtime, f"cudaGraph{name}"))
    assert callable(runtime.cudaStreamGetCaptureInfo)
    for kind in ("Kernel", "Memset", "Memcpy"):
        assert hasattr(runtime.cudaGraphNodeType, f"cudaGraphNodeType{kind}")


def test_a_status_that_is_an_error_is_one() -> None:
    assert checked((0, 3, "a")) == (3, "a")
    with pytest.raises(RuntimeError, match="CUDA: 2"):
        checked((2, None))
