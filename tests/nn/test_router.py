"""The router: its equation, groups, masks, decisions within a sample, initialisation, and that it learns a budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdfast.losses import BudgetLoss
from xdfast.nn import BudgetShift, GateFunction, GateSchedule, LayerRouter


def test_forward_is_the_equation() -> None:
    router = LayerRouter(8, num_layers=5, branches=2, hidden=6, groups=[(1, 4), slice(4, None)]).double()
    x = torch.randn(3, 9, 8, dtype=torch.double)
    pooled = []
    for (linear, norm), part in zip(router.projections, (x[:, 1:4], x[:, 4:])):
        hidden = nn.functional.layer_norm(part @ linear.weight.T + linear.bias, (6,), norm.weight, norm.bias)
        pooled += [hidden.mean(1), hidden.max(1).values]
    expected = (torch.cat(pooled, 1) @ router.head.weight.T + router.head.bias).reshape(3, 5, 2)
    torch.testing.assert_close(router(x), expected)


@pytest.mark.parametrize("pool", ["meanmax", "mean", "max"])
def test_masked_pooling_is_pooling_of_the_cropped_sequence(pool) -> None:
    router = LayerRouter(8, 5, hidden=6, pool=pool, groups=[(0, 4), (4, None)]).double()
    lengths = [9, 6, 5, 7]
    x = torch.randn(4, 9, 8, dtype=torch.double)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    x[~mask] = float("nan")  # padding is nobody's business
    for logits, sample, length in zip(router(x, mask), x, lengths):
        torch.testing.assert_close(logits, router(sample[None, :length])[0])
    router(x, mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


def test_a_sample_without_a_group_has_zeros_there() -> None:
    router = LayerRouter(8, 5, hidden=6, groups=[(0, 4), (4, None)])
    x, mask = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    logits = router(x, mask)
    assert logits.isfinite().all()
    vision = router.projections[0](x[1:, :4])
    pooled = torch.cat([vision.mean(1), vision.amax(1), torch.zeros(1, 12)], 1)
    torch.testing.assert_close(logits[1].flatten(), router.head(pooled)[0])
    mask[1] = False
    assert router(x, mask)[1].flatten().equal(router.head.bias)
    router(x, mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_mean_in_half_precision(dtype) -> None:
    # bfloat16 has no 257 and float16 no sum above 65504: counts and sums are float32
    router = LayerRouter(4, 2, hidden=4, pool="mean").to(dtype)
    nn.init.constant_(router.projections[0][1].bias, 300.0)
    x = torch.randn(1, 257, 4).to(dtype)
    with_mask, without = (router(x, mask).float() for mask in (torch.ones(1, 257, dtype=torch.bool), None))
    torch.testing.assert_close(with_mask, without, rtol=1e-2, atol=1e-2)


def test_samples_do_not_see_each_other() -> None:
    router, x = LayerRouter(8, 5, branches=2, hidden=6).double(), torch.randn(6, 9, 8, dtype=torch.double)
    order = torch.randperm(6)
    torch.testing.assert_close(router(x[order]), router(x)[order], rtol=0, atol=1e-14)


def test_decisions_per_token_and_per_block() -> None:
    x = torch.randn(2, 12, 8, dtype=torch.double)
    router = LayerRouter(8, 5, branches=2, hidden=6, pool="none").double()
    assert router(x).shape == (2, 12, 5, 2)
    order = torch.randperm(12)
    torch.testing.assert_close(router(x[:, order]), router(x)[:, order])
    blocks = LayerRouter(8, 5, branches=2, hidden=6, pool="block", block_rows=4).double()
    assert blocks(x).shape == (2, 3, 5, 2)
    # a block is what a sample of its tokens would be
    samples = LayerRouter(8, 5, branches=2, hidden=6).double()
    samples.load_state_dict(blocks.state_dict())
    torch.testing.assert_close(blocks(x).flatten(0, 1), samples(x.reshape(6, 4, 8)))
    mask = torch.arange(12) < torch.tensor([12, 6])[:, None]
    assert blocks(x.masked_fill(~mask[..., None], float("nan")), mask).isfinite().all()
    torch.testing.assert_close(blocks(x, mask)[1, 1], samples(x[1:, 4:6])[0])
    assert router(x.masked_fill(~mask[..., None], float("nan")), mask).isfinite().all()


def test_at_first_nearly_everything_is_on_and_every_weight_has_a_gradient() -> None:
    router = LayerRouter(64, 24, branches=2)
    logits = router(torch.randn(32, 50, 64))
    assert (logits > 0).float().mean() > 0.999
    assert logits.mean().item() == pytest.approx(2, abs=0.2)
    logits.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in router.parameters())


def test_flops_are_those_of_the_linear_maps() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for options in (
        {"groups": [(1, 4), (4, None)]},
        {"pool": "none"},
        {"pool": "block", "block_rows": 4},
        {"pool": "max"},
    ):
        router = LayerRouter(8, 5, branches=2, hidden=6, **options)
        with FlopCounterMode(display=False) as counter:
            router(torch.randn(1, 12, 8))
        assert router.flops(12) == counter.get_total_flops()


def test_a_router_reaches_its_budget() -> None:
    make = torch.Generator().manual_seed(0)
    router = LayerRouter(16, 12, branches=2, hidden=16)
    gate = GateFunction(generator=make)
    schedule = GateSchedule("hard_st", warmup_steps=60, steps=300)
    costs = torch.tensor([[1.0, 2.0]]).expand(12, 2)
    criterion = BudgetLoss(0.5, costs, always_on=(0, -1), return_components=True)
    optimizer = torch.optim.Adam(router.parameters(), lr=3e-3)
    for step in range(300):
        gate.set(*schedule(step))
        loss = criterion(gate(router(torch.randn(64, 6, 16, generator=make)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.eval()
    with torch.no_grad():
        fraction = criterion(gate(router(torch.randn(2000, 6, 16, generator=make)))).fraction
    assert fraction.item() == pytest.approx(0.5, abs=0.02)


def test_router_and_gate_compile_into_one_graph() -> None:
    model = nn.Sequential(LayerRouter(8, 3, hidden=4, groups=[(0, 2), (2, None)]), GateFunction("hard_st", tau=0.7))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 8)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    model[1].set(tau=0.5, threshold=0.9)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), model(x))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_layers must be a positive integer, got 0"):
        LayerRouter(8, 0)
    with pytest.raises(ValueError, match="hidden must be a positive integer, got 2.5"):
        LayerRouter(8, 2, hidden=2.5)
    with pytest.raises(ValueError, match=r"pool must be one of .*got 'average'"):
        LayerRouter(8, 2, pool="average")
    with pytest.raises(ValueError, match="block_rows is the tokens per block.*pool='meanmax' and block_rows=4"):
        LayerRouter(8, 2, block_rows=4)
    with pytest.raises(ValueError, match="block_rows=None"):
        LayerRouter(8, 2, pool="block")
    with pytest.raises(ValueError, match="drop groups"):
        LayerRouter(8, 2, pool="none", groups=[(0, 4)])
    with pytest.raises(ValueError, match="at least one slice"):
        LayerRouter(8, 2, groups=[])
    with pytest.raises(ValueError, match="bias_init must be a finite number"):
        LayerRouter(8, 2, bias_init=float("nan"))
    for wrong in ((1, 2, 3), slice(0, 8, 2), (0.5, 2)):
        with pytest.raises(ValueError, match="a group is a slice or a pair"):
            LayerRouter(8, 2, groups=[wrong])
    router = LayerRouter(8, 2, hidden=4, groups=[(1, 5), (5, None)])
    with pytest.raises(ValueError, match=r"tokens of shape \[B, T, 8\], got \[2, 9, 7\]"):
        router(torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match="group 1, tokens 5:, holds none of the T=5 tokens"):
        router(torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match="group 0, tokens 1:5, reaches beyond the T=4 tokens"):
        router(torch.zeros(2, 4, 8))
    with pytest.raises(TypeError, match=r"mask must be bool.*float32; use mask.bool\(\)"):
        router(torch.zeros(2, 9, 8), torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"\[B, T\] = \[2, 9\], got \[9, 2\]"):
        router(torch.zeros(2, 9, 8), torch.ones(9, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiple of block_rows=4, got T=9"):
        LayerRouter(8, 2, pool="block", block_rows=4)(torch.zeros(2, 9, 8))


@pytest.mark.parametrize("pool", ["meanmax", "none"])
def test_a_standardised_router_tells_samples_apart_whatever_they_have_in_common(pool) -> None:
    router = LayerRouter(16, 6, branches=2, hidden=8, pool=pool, standardise=True, bias_init=0.0)
    x = torch.randn(64, 5, 16) * 0.1 + 3  # nearly the same tokens
    logits = router(x)
    rows = logits.flatten(0, -3)
    assert torch.allclose(rows.mean(0), torch.zeros(6, 2), atol=1e-4)
    assert torch.allclose(rows.std(0), torch.ones(6, 2), atol=0.05)
    plain = LayerRouter(16, 6, branches=2, hidden=8, pool=pool, bias_init=0.0)
    assert plain(x).flatten(0, -3).std(0).max() < 0.3
    with torch.no_grad():
        router.head.bias.fill_(-1.0)
        router.gain.fill_(2.0)
        assert float((router(x) > 0).float().mean()) == pytest.approx(0.31, abs=0.08)  # P(2 z > 1)
    router(x).square().sum().backward()
    assert router.head.weight.grad.abs().sum() > 0 and router.gain.grad.abs().min() > 0


def test_a_standardised_router_decides_alone_as_in_company() -> None:
    router, x = LayerRouter(16, 4, hidden=8, standardise=True), torch.randn(32, 5, 16)
    for _ in range(200):
        trained = router(x)
    router.eval()
    together = router(x)
    assert torch.allclose(together, trained, atol=0.1)  # the running means arrive
    assert torch.allclose(torch.cat([router(row[None]) for row in x]), together, atol=1e-5)
    router.train()
    assert torch.allclose(router(x[:1]), together[:1], atol=1e-5)  # one sample has no spread of its own
    twin = LayerRouter(16, 4, hidden=8, standardise=True)
    twin.load_state_dict(router.state_dict())
    assert torch.equal(twin.eval()(x), together)
    half = router.eval().bfloat16()(x.bfloat16())
    assert torch.allclose(half.float(), together, atol=0.15)


def test_a_router_that_leans_starts_as_static_pruning() -> None:
    torch.manual_seed(0)
    influence = torch.tensor([0.5, 0.01, 0.3, 0.02, 0.2, 0.9])
    router = LayerRouter(8, 6, branches=2, hidden=4)
    router.lean(influence)
    assert router.head.bias.unflatten(0, (6, 2))[:, 0].tolist() == pytest.approx([2.6, 1.0, 2.2, 1.4, 1.8, 3.0])
    tokens = torch.randn(64, 5, 8)
    assert bool((router(tokens) > 0).all())  # everything on at first
    router.hold = BudgetShift(0.5, [[1.0, 1.0]] * 6, always_on=())
    on = (router(tokens) > 0).float().mean((0, 2))
    assert on[[0, 2, 5]].mean() > 0.9 and on[[1, 3, 4]].mean() < 0.1  # as the three most influential layers alone
    with pytest.raises(ValueError, match="6 finite numbers"):
        router.lean(influence[:5])
    with pytest.raises(ValueError, match="6 finite numbers"):
        router.lean(influence * float("nan"))


def test_a_router_can_start_from_decisions() -> None:
    torch.manual_seed(1)
    router = LayerRouter(16, num_layers=6, hidden=8, groups=[(0, 3), (3, None)])
    kind = torch.arange(40) % 4
    tokens = torch.randn(40, 7, 16)
    tokens[:, 3:] += 2 * torch.randn(4, 1, 16)[kind]  # what tells the kinds apart
    mask = torch.ones(40, 7, dtype=torch.bool)
    mask[:, -1] = False
    paths = torch.rand(4, 6) > 0.5
    paths[:, 0], paths[:, 1] = True, False  # the same for all
    parts = [(tokens[:25], mask[:25]), (tokens[25:], mask[25:])]
    right = router.fit(parts, paths[kind])
    with torch.no_grad():
        logits = router(tokens, mask)[..., 0]
    assert right == 1.0 and torch.equal(logits > 0, paths[kind])
    assert abs(float(logits.abs().mean()) - 2) < 0.3
    with pytest.raises(ValueError, match=r"wanted must be \[40, 6\]"):
        router.fit(parts, paths)
    with pytest.raises(ValueError, match="standardise=False"):
        LayerRouter(16, 6, hidden=8, standardise=True).fit(parts, paths[kind])
    with pytest.raises(ValueError, match="no blocks"):
        LayerRouter(16, 6, hidden=8, pool="none").fit(parts, paths[kind])


def test_a_frozen_router_decides_and_does_not_learn() -> None:
    router = LayerRouter(16, num_layers=4, hidden=8)
    tokens = torch.randn(3, 5, 16, requires_grad=True)
    logits = router(tokens)
    router.frozen = True
    still = router(tokens)
    assert torch.equal(still, logits)
    still.square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in router.parameters())
    router.frozen = False
    router(tokens).square().sum().backward()
    assert all(p.grad.any() for p in router.parameters())
