"""The routed ops' Triton backend, wired as on a GPU, in Triton's interpreter: the same as the plain PyTorch backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import itertools, sys
sys.path.append(sys.argv[1])
import torch
from routed_parts import route_of
from xdfast.ops.routed import op
from xdfast.ops.routed.triton import TritonRouted, carried_ln_linear, carried_residual_, carried_statistics, fold_norm

torch.manual_seed(0)
plain, ours = op._TORCH, TritonRouted()

def compare(a, b, n=None):
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
    a, b = (a, b) if n is None else (a[:n], b[:n])
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)

def leaf(*shape):
    return torch.randn(*shape)

for known, (norm, act) in itertools.product((True, False), (("layer", "gelu"), ("rms", "swiglu"), ("none", "none"))):
    gate = torch.tensor([0.6, 0.0, 0.9, 0.7])
    route = route_of([True, False, True, True], 3, gate=gate, known=known)
    n, wide = 9, 2 if act == "swiglu" else 1
    x, weight, bias, outer, outer_bias = leaf(12, 24), leaf(20 * wide, 24), leaf(20 * wide), leaf(24, 20), leaf(24)
    norm_weight = None if norm == "none" else leaf(24)
    norm_bias = leaf(24) if norm == "layer" else None
    lists = (route.index, route.count, -1 if route.units is None else route.units, 3)
    first = (x, weight, bias, norm_weight, norm_bias, *lists, norm, 1e-5, act, True)
    (h, pre, statistics), (h2, pre2, statistics2) = ours.ln_linear(*first), plain.ln_linear(*first)
    compare(h, h2, n)
    compare(pre, pre2, n)
    compare(statistics, statistics2, n)
    alone = (x, None, None, *first[3:-2], "none", True)  # the norm alone
    for mine, theirs in zip(ours.ln_linear(*alone), plain.ln_linear(*alone)):
        compare(mine, theirs, n)
    wanted = [True, True, True, norm_weight is not None, norm_bias is not None]
    dout = leaf(*h.shape)
    back = (x, pre2, statistics2, weight, norm_weight, norm_bias, *lists, norm, 1e-5, act, wanted)
    for mine, theirs in zip(ours.ln_linear_backward(dout, *back), plain.ln_linear_backward(dout, *back)):
        compare(mine, theirs)
    a, b = x.clone(), x.clone()
    ours.linear_residual_(a, h2, outer, outer_bias, gate, *lists)
    plain.linear_residual_(b, h2, outer, outer_bias, gate, *lists)
    compare(a, b)
    assert torch.equal(a[3:6], x[3:6])
    y, up = leaf(*h.shape[:1], 24), leaf(12, 24)
    whole = (up, h2, outer, outer_bias, gate, *lists, [True] * 4)
    for back in (whole, (up, y, None, None, gate, *lists, [True, False, False, True])):
        (dh, *mine), (dh2, *theirs) = ours.linear_residual_backward(*back), plain.linear_residual_backward(*back)
        compare(dh, dh2, n)
        for one, other in zip(mine, theirs):
            compare(one, other)
    moments, folded = carried_statistics(x), fold_norm(weight, bias, norm_weight, norm_bias)
    compare(carried_ln_linear(x, moments, folded, route, norm, 1e-5, act), h2, n)
    c = x.clone()
    carried_residual_(c, moments, h2, outer, outer_bias, route)
    compare(c, b)
    compare(moments, carried_statistics(c))
empty = route_of([False] * 4, 3)
assert ours.ln_linear(x, weight, bias, None, None, empty.index, empty.count, 0, 3, "none", 1e-5, "none", True)[0].shape == (0, 20)
print("agree")
"""


def test_triton_backend_agrees_with_plain_pytorch(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parents[1])]
    process = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "agree"
