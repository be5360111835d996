"""The op's Triton backend, wired as on a GPU, in Triton's interpreter: the same outputs as the plain PyTorch backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import itertools, torch
from xdfast.ops.rsd import native
from xdfast.ops.rsd.fast import prepare_torch, rsd_forward

def compare(ours, plain):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (a.shape, a.dtype, b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

torch.manual_seed(0)
needs = ((True, False), (False, True), (True, True), (False, False))
for (n, d), need, mode in itertools.product(((20, 33), (33, 20)), needs, ("std", "var")):
    student, teacher = torch.randn(n, d), torch.randn(n, d)
    args = (student, teacher, 0.01, 1e-5, mode, "float32", 0.5, *need)
    compare(native.run_triton(*args, None, None), rsd_forward(*args))
    if not need[1]:
        prepared = native.prepare_triton(teacher, 1e-5, mode, "float32")
        compare(prepared, prepare_torch(teacher, 1e-5, mode, "float32"))
        gram = prepared[1] if prepared[1].numel() else None
        compare(native.run_triton(*args, prepared[0], gram), rsd_forward(*args))
double = torch.randn(9, 12, dtype=torch.float64)
assert native.run_triton(double, double + 1, 0.01, 1e-5, "std", "float32", 1.0, True, False, None, None)[0].dtype == torch.float64
half = torch.randn(20, 33).half()
gradient = native.run_triton(half, half.flip(0), 0.01, 1e-5, "std", "float16", 1.0, True, False, None, None)[4]
assert gradient.dtype == torch.float16 and gradient.isfinite().all()
print("agree")
"""


def test_triton_backend_agrees_with_plain_pytorch(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    process = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "agree"
