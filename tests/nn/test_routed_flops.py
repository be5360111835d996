"""What a routed stack costs: by its plan, by torch's counter, by fvcore and by counting one pair after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import xdfast.reporting
from xdfast.nn.branches import AttentionBranch, MLPBranch, ModuleBranch
from xdfast.nn.routed import RoutedStack
from xdfast.nn.routed_flops import TILE, count_routed
from xdfast.nn.router import LayerRouter
from xdfast.ops._flops import missing_formulas

D, HEADS, T, B, L = 32, 4, 9, 5, 3


class Layer(nn.Module):
    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv = nn.Linear(D, D + 2 * kv_heads * (D // HEADS))
        self.proj = nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.kv_heads = kv_heads

    def branches(self, causal: bool = False) -> tuple[AttentionBranch, MLPBranch]:
        attention = AttentionBranch(
            self.norm1, self.qkv, self.proj, HEADS, kv_heads=self.kv_heads, causal=causal
        )  # fmt: skip
        return attention, MLPBranch(self.norm2, self.fc1, "gelu", self.fc2)


def _stack(router: LayerRouter | None = None, kv_heads: int = HEADS, **options) -> RoutedStack:
    layers = [Layer(kv_heads) for _ in range(L)]
    options.setdefault("always_on", ())
    return RoutedStack(layers, [layer.branches() for layer in layers], router, **options).eval()


def _counted(stack: RoutedStack, *inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter:
        stack(*inputs)
    return int(counter.get_total_flops())


def _brute(active: torch.Tensor, keys: str, all_kv: bool) -> int:
    """Unit by unit and pair by pair, tokens as units: active [B, T, L, 2] bool."""
    total = 0
    for layer in range(L):
        for b in range(B):
            for token in range(T):
                if active[b, token, layer, 1]:
                    total += 2 * (2 * 4 * D * D)
                if active[b, token, layer, 0]:
                    total += 2 * (4 * D * D)
                    seen = T if keys == "all" else int(active[b, :, layer, 0].sum())
                    total += 2 * 2 * seen * D
                elif all_kv and active[:, :, layer, 0].any():
                    total += 2 * (2 * D * D)
    return total


@pytest.mark.parametrize("executor", ["cpu", "planned", "dense_mask"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_executed_flops_of_samples_are_those_that_torch_counts(executor, share) -> None:
    stack = _stack(executor=executor)
    gates = (torch.rand(B, L, 2) < share).float()
    found = _counted(stack, torch.randn(B, T, D), gates)
    cost = stack.flops(T)
    assert found == cost.executed and cost.executor == executor and cost.router == 0
    assert cost.dense == int(stack.costs(T).sum()) * B
    assert cost.nominal == pytest.approx(float((gates.sum(0) * stack.costs(T, 2)).sum()))
    assert cost.fraction_executed == (1 if executor == "dense_mask" else cost.nominal / cost.dense)


@pytest.mark.parametrize("executor", ["cpu", "planned", "dense_mask"])
@pytest.mark.parametrize("keys", ["active", "all"])
def test_tokens_pay_for_the_keys_they_see(keys, executor) -> None:
    stack = _stack(executor=executor, unit="token", keys=keys)
    gates = (torch.rand(B * T, L, 2) < 0.4).float()
    gates[:, 1] = 0
    gates[:T, 2] = 0
    found = _counted(stack, torch.randn(B, T, D), gates)
    active = gates.bool().view(B, T, L, 2)
    cost = stack.flops(T)
    assert cost.nominal == _brute(active, keys, all_kv=False)
    assert found == cost.executed
    if executor != "dense_mask":
        assert cost.executed == _brute(active, keys, all_kv=keys == "all")


def test_grouped_queries_and_causal_attention() -> None:
    layers = [Layer(kv_heads=2) for _ in range(L)]
    stack = RoutedStack(layers, [x.branches(causal=True) for x in layers], executor="cpu", always_on=())
    found = _counted(stack.eval(), torch.randn(B, T, D), (torch.rand(B, L) < 0.5).float())
    assert found == stack.flops(T).executed
    tokens = _stack(kv_heads=1, executor="cpu", unit="token", keys="all")
    found = _counted(tokens, torch.randn(B, T, D), (torch.rand(B * T, L) < 0.3).float())
    assert found == tokens.flops(T).executed


def test_the_router_is_counted_when_it_decides() -> None:
    stack = _stack(LayerRouter(D, L, hidden=16), executor="cpu")
    x = torch.randn(B, T, D)
    assert _counted(stack, x) == stack.flops(T).executed
    assert stack.flops(T).router == B * stack.router.flops(T) > 0
    _counted(stack, x, torch.ones(B, L))
    assert stack.flops(T).router == 0


def test_bfloat16_and_layer_scale_do_not_change_the_count() -> None:
    stack = _stack(executor="cpu").bfloat16()
    gates = (torch.rand(B, L) < 0.5).float()
    assert _counted(stack, torch.randn(B, T, D, dtype=torch.bfloat16), gates) == stack.flops(T).executed


def test_lists_are_padded_to_tiles_and_attention_is_not() -> None:
    stack = _stack(executor="cpu")
    gates = torch.zeros(B, L)
    gates[:2] = 1
    _counted(stack, torch.randn(B, T, D), gates)
    exact, listed = stack.flops(T), count_routed(stack, T, executor="list", tile=16)
    linear = 2 * 12 * D * D * L
    assert listed.executed - exact.executed == linear * (32 - 2 * T) and TILE % 16 == 0
    assert count_routed(stack, T, executor="list", tile=1000).executed - exact.executed == linear * 3 * T
    assert listed.nominal == exact.nominal and count_routed(stack, T, executor="dense_mask").executed == exact.dense


def test_a_plan_is_counted_without_a_run() -> None:
    stack = _stack(unit="block", executor="planned", keys="active")
    x, gates = torch.randn(B, T, D), (torch.rand(B * 3, L) < 0.5).float()
    plan = stack.plan(x, gates[..., None])
    cost = stack.flops(T, plan)
    assert _counted(stack, x, gates) == cost.executed == stack.flops(T).executed


def test_explored_units_are_executed_and_not_asked_for() -> None:
    stack = _stack(executor="planned", sparse_train=True, explore=1.0).train()
    gates = torch.zeros(B, L)
    _counted(stack, torch.randn(B, T, D), gates)
    assert stack.flops(T).nominal == 0 and stack.flops(T).executed == stack.flops(T).dense


def test_any_module_is_tried_once() -> None:
    layers = [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(2)]
    branches = [[ModuleBranch(x[0], x[1], rowwise=True)] for x in layers]
    stack = RoutedStack(layers, branches, always_on=(), executor="cpu").eval()
    assert stack.costs(T).tolist() == [[2 * T * D * D]] * 2
    with torch.no_grad():
        stack(torch.randn(B, T, D), torch.tensor([[1.0, 0.0]]).repeat(B, 1))
    assert stack.flops(T).nominal == B * 2 * T * D * D
    said = [[ModuleBranch(None, x, rowwise=True, macs_per_row=lambda tokens: 7)] for x in layers]
    assert RoutedStack(layers, said, always_on=()).costs(T).tolist() == [[14 * T]] * 2
    unknown = RoutedStack(layers, [[ModuleBranch(None, x)] for x in layers], always_on=())
    with pytest.raises(ValueError, match="macs_per_row"):
        unknown.costs(T)


def test_ideal_and_its_fraction() -> None:
    stack = _stack(executor="cpu")
    gates = torch.zeros(4, L)
    gates[:2] = 1
    _counted(stack, torch.randn(4, T, D), gates)
    cost = stack.flops(T)
    assert cost.ideal == 2 and cost.fraction_of_ideal(1.5) == 0.75 and cost.to_dict()["fraction_nominal"] == 0.5
    _counted(stack, torch.randn(4, T, D), torch.zeros(4, L))
    assert stack.flops(T).ideal == float("inf") and stack.flops(T).fraction_of_ideal(3.0) == 0


def test_what_cannot_be_counted() -> None:
    stack = _stack()
    with pytest.raises(ValueError, match="decided nothing yet"):
        stack.flops(T)
    with pytest.raises(ValueError, match="at least one token, got 0"):
        stack.costs(0)
    _counted(stack, torch.randn(B, T, D), torch.ones(B, L))
    with pytest.raises(ValueError, match="samples of 9 tokens, not 4"):
        stack.flops(4)
    blocks = _stack(unit="block", executor="dense_mask")
    _counted(blocks, torch.randn(B, T, D), torch.ones(B * 3, L))
    with pytest.raises(ValueError, match="give the plan"):
        blocks.flops(T)


@pytest.mark.parametrize(
    "options", [{}, {"unit": "token", "keys": "active"}, {"unit": "token", "keys": "all"}], ids=str
)
@pytest.mark.parametrize("executor", ["cpu", "planned", "dense_mask"])
def test_fvcore_and_torch_count_what_the_gates_of_that_input_ask_for(executor, options) -> None:
    torch.manual_seed(3)
    pool = "none" if options else "meanmax"
    stack = _stack(LayerRouter(D, L, hidden=16, pool=pool, bias_init=0.0), executor=executor, **options)
    nn.init.normal_(stack.router.head.weight)
    x = torch.randn(B, T, D)
    with torch.no_grad():
        stack(x)
    cost = stack.flops(T)
    assert 0 < cost.fraction_nominal < 1.5 and stack.decision.gates.mean() < 1
    found = xdfast.reporting.count_flops(stack, inputs=x)
    assert found.torch_flops == cost.executed
    assert 2 * found.products == pytest.approx(cost.executed) and found.relative_difference < 1e-6


def test_the_dense_stack_is_what_fvcore_counts_of_its_layers() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    branches = [
        (
            AttentionBranch(b.norm1, b.attn.qkv, b.attn.proj, b.attn.num_heads, whole=[b.attn, b.ls1]),
            MLPBranch(b.norm2, b.mlp.fc1, "gelu", b.mlp.fc2, whole=[b.mlp, b.ls2]),
        )
        for b in model.blocks
    ]
    stack = RoutedStack(list(model.blocks), branches, always_on=())
    dense = xdfast.reporting.count_flops(model.blocks, inputs=torch.randn(2, 17, 192))
    assert 2 * dense.products == dense.torch_flops == 2 * int(stack.costs(17).sum())
