"""The executor ``list``, as on a GPU, in Triton's interpreter: the same numbers, and no count that the host would know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_SCRIPT = """
import sys
sys.path.append(sys.argv[1])
import torch
from dataclasses import replace
from torch import nn
from test_routed import B, D, L, T, blocks, hard_gates, run, stack_of
from xdfast.nn import GateFunction
from xdfast.nn.branches import AttentionBranch, MLPBranch, ModuleBranch
from xdfast.nn.routed import RoutedStack

torch.manual_seed(0)
x = torch.randn(B, T, D)

def carried(stack, gates):
    with torch.no_grad():
        plan = replace(stack.plan(x, gates), host_counts=None)
        assert plan.of(0).units is None and plan.of(0).capacity == B * T
        flat = x.reshape(-1, D).clone()
        return stack.carry(flat, plan, T, {}).view(x.shape)

for unit, units, branches in (("sample", B, 1), ("sample", B, 2), ("token", B * T, 1)):
    for keys in ("all", "active"):
        stack = stack_of(blocks(3), unit=unit, keys=keys)
        gates = hard_gates(units, branches)[:, :3]
        expected = run(stack, "dense_mask", x, gates)
        out = carried(stack, gates)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
gates = torch.zeros(B, 3, 1)
stack = stack_of(blocks(3))
assert torch.equal(carried(stack, gates), x)
gates[1] = 1
out = carried(stack, gates)
assert torch.equal(out[[0, 2, 3, 4]], x[[0, 2, 3, 4]]) and not torch.equal(out[1], x[1])

gates, order = hard_gates(B)[:, :3], torch.randperm(B)
out = carried(stack, gates)
stack.gate = GateFunction("soft")  # multiplied by 1: the same bits as listed alone
assert torch.equal(carried(stack, gates), out)
stack.gate = GateFunction()
x = x[order]
# Samples in another order; numpy, which multiplies in the interpreter, rounds by a row's place in its tile.
torch.testing.assert_close(carried(stack, gates[order]), out[order], rtol=1e-4, atol=1e-4)
with torch.no_grad():
    stack.get_parameter("1.norm2.weight").mul_(2)  # folded into the weights behind it
torch.testing.assert_close(carried(stack, gates), run(stack, "dense_mask", x, gates), rtol=1e-3, atol=1e-3)

wide = (nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D))
made = nn.ModuleList([nn.LayerNorm(D), nn.Linear(D, D), nn.RMSNorm(D), *wide])
rows = (ModuleBranch(made[0], made[1], rowwise=True), MLPBranch(made[2], (made[3], made[4]), "swiglu", made[5]))
stack = RoutedStack([made], [rows], always_on=()).eval()
gates = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
torch.testing.assert_close(carried(stack, gates[:, None]), run(stack, "dense_mask", x, gates), rtol=1e-3, atol=1e-3)
print("agree")
"""


def test_the_list_executor_agrees_with_multiplied_masks(tmp_path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent)]
    process = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "agree"
