"""The routed kernels on a GPU, at the shapes of transformers, against their equations in fp64."""

from __future__ import annotations

import pytest
import torch
from routed_kernel_parts import EPS, activate, normalize, plan, randn
from tolerances import relative
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.gpu

GPU_SHAPES = [(16, 197, 384, 1536), (1, 197, 384, 1536), (8, 197, 1024, 4096), (4, 292, 4096, 4096), (3, 50, 100, 70)]
GPU_TOLERANCE = {"float32": 1e-5, "tf32": 3e-3, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.mark.parametrize("precision", list(GPU_TOLERANCE))
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_a_branch_and_its_gradients_on_the_gpu(shape, precision, act):
    from xdfast.kernels import routed_gradients, routed_linear

    units, rows_per_unit, width, hidden = shape
    dtype = "float32" if precision == "tf32" else precision
    p = plan(units, rows_per_unit, "some" if units > 1 else "all", seed=2)
    wide = hidden * (2 if act == "swiglu" else 1)
    x = randn(p.capacity, width, seed=0, dtype=dtype)
    w1 = randn(wide, width, seed=1, dtype=dtype, scale=width**-0.5)
    w2 = randn(width, hidden, seed=2, dtype=dtype, scale=hidden**-0.5)
    b1, b2, gamma, beta = (
        randn(n, seed=3, scale=0.1, shift=s) for n, s in ((wide, 0), (width, 0), (width, 1), (width, 0))
    )
    cuda = [t.cuda() for t in (x, w1, w2, b1, b2, gamma, beta, p.gate, *p.where[:2])]
    xc, w1c, w2c, b1c, b2c, gammac, betac, gatec, index, count = cuda
    where, options = (index, count, rows_per_unit), {"norm": "layer", "act": act, "precision": precision}
    h, pre = torch.empty(p.capacity, hidden, dtype=x.dtype).cuda(), torch.empty(p.capacity, wide, dtype=x.dtype).cuda()
    row = torch.empty(p.capacity, 2).cuda()
    routed_linear.norm_linear(xc, w1c, b1c, gammac, betac, *where, h, eps=EPS, pre=pre, row_statistics=row, **options)
    statistics = torch.empty(p.capacity, routed_linear.statistics_parts(width), 2).cuda()
    routed_linear.moments(xc, statistics)
    folded, sums, shift = routed_linear.fold_norm(w1c, b1c, gammac, betac, x.dtype)
    carried = torch.empty_like(h)
    routed_linear.norm_linear(
        xc, folded, shift, None, None, *where, carried, eps=EPS, statistics=statistics, weight_sums=sums, **options
    )
    new = xc.clone()
    routed_linear.linear_residual(new, h, w2c, b2c, gatec, *where, statistics=statistics, precision=precision)
    leaves = [t.double().requires_grad_() for t in cuda[:8]]
    x64, w164, w264, b164, b264, gamma64, beta64, gate64 = leaves
    rows, unit = p.rows.cuda(), p.unit.cuda()
    hidden64 = activate(functional.linear(normalize(x64, gamma64, beta64, "layer")[rows], w164, b164), act)
    out64 = x64.index_add(0, rows, functional.linear(hidden64, w264, b264) * gate64[unit, None])
    limit = GPU_TOLERANCE[precision]
    assert relative(h[: p.n], hidden64) < limit and relative(carried[: p.n], hidden64) < limit
    assert relative(new, out64) < limit and torch.equal(new[p.inactive.cuda()], xc[p.inactive.cuda()])
    dout = randn(p.capacity, width, seed=7, dtype=dtype).cuda()
    wanted = torch.autograd.grad((out64 * dout.double()).sum(), leaves)
    found = [torch.empty_like(t) for t in (w2c, b2c)] + [torch.zeros(units).cuda(), torch.empty_like(h)]
    routed_gradients.linear_residual_backward(
        dout, h, w2c, b2c, gatec, *where, dweight=found[0], dbias=found[1], dgate=found[2], dh=found[3],
        precision=precision,
    )  # fmt: skip
    more = [torch.zeros_like(xc), *(torch.empty_like(t) for t in (w1c, b1c, gammac, betac))]
    routed_gradients.norm_linear_backward(
        found[3], xc, w1c, gammac, betac, pre, row, *where, **options, dx=more[0], dweight=more[1], dbias=more[2],
        dnorm_weight=more[3], dnorm_bias=more[4],
    )  # fmt: skip
    got = (more[0] + dout, more[1], found[0], more[2], found[1], more[3], more[4], found[2])
    wanted = (*wanted[:7], torch.where(gate64.isnan(), 0, wanted[7]))
    for ours, want in zip(got, wanted):
        assert relative(ours, want) < 3 * limit


def test_captured_in_a_cuda_graph_with_another_plan():
    from xdfast.kernels import routed_linear
    from xdfast.kernels.route_plan import route_plan

    units, rows_per_unit, width = 8, 197, 384
    x = randn(units * rows_per_unit, width, seed=0, dtype="bfloat16").cuda()
    w = randn(width, width, seed=1, dtype="bfloat16", scale=width**-0.5).cuda()
    h, gates = torch.empty_like(x), torch.rand(units, 1, 1).cuda()
    lists = [torch.empty(1, 1, *s, dtype=torch.int32).cuda() for s in ((units,), (units,), (), (units + 1,), ())]
    lists[0] = lists[0].float()

    def step() -> Tensor:
        route_plan(gates, None, 0.5, False, rows_per_unit, units, *lists)
        gate, index, count = (t[0, 0] for t in lists[:3])
        out = x.clone()
        routed_linear.norm_linear(x, w, None, None, None, index, count, rows_per_unit, h, norm="rms", eps=EPS)
        routed_linear.linear_residual(out, h, w, None, gate, index, count, rows_per_unit, precision="bfloat16")
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        gates.copy_(torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(captured, step())
