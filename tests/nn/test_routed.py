"""Routed stacks: every executor computes x + g · f(norm(x)), and what is off costs and changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import Block
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdfast.losses import BudgetLoss
from xdfast.nn import GateFunction, LayerRouter
from xdfast.nn.branches import AttentionBranch, MLPBranch, ModuleBranch
from xdfast.nn.routed import RoutedStack

B, T, D, L = 5, 12, 32, 4


def blocks(layers: int = L, **options) -> list[Block]:
    made = [Block(D, 2, qkv_bias=True, init_values=0.7, **options) for _ in range(layers)]
    for module in nn.ModuleList(made).modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.25)
        if isinstance(module, (nn.LayerNorm, LayerScale)):
            nn.init.normal_(next(module.parameters()), mean=1.0, std=0.3)
    return made


def stack_of(made: list[Block], **options) -> RoutedStack:
    rows = [
        (
            AttentionBranch(b.norm1, b.attn.qkv, b.attn.proj, 2, scale=b.ls1, whole=[b.attn, b.ls1]),
            MLPBranch(b.norm2, b.mlp.fc1, "gelu", b.mlp.fc2, scale=b.ls2, whole=[b.mlp, b.ls2]),
        )
        for b in made
    ]
    return RoutedStack(made, rows, **{"always_on": (), **options}).eval()


def run(stack: RoutedStack, executor: str, x: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
    stack.executor = executor
    with torch.no_grad():
        out = stack(x, gates)
    assert stack.decision.executor == executor
    return out


def hard_gates(units: int, branches: int = 1) -> torch.Tensor:
    gates = (torch.rand(units, L, branches) > 0.5).float()
    gates[0], gates[-1] = 1, 0  # some on and some off everywhere
    return gates


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for float32 rounding through four layers."""
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_gates_it_is_the_dense_stack() -> None:
    made, x = blocks(), torch.randn(B, T, D)
    stack = stack_of(made)
    with torch.no_grad():
        expected = nn.Sequential(*made)(x)
    assert torch.equal(run(stack, "dense_mask", x), expected)
    for executor in ("cpu", "planned"):
        close(run(stack, executor, x), expected)
        assert torch.equal(run(stack, executor, x, torch.ones(B, L)), run(stack, executor, x))


@pytest.mark.parametrize("executor", ["dense_mask", "cpu", "planned"])
def test_multiplied_by_one_is_not_multiplied_bit_for_bit(executor) -> None:
    stack, x, gates = stack_of(blocks()), torch.randn(B, T, D), hard_gates(B)
    expected = run(stack, executor, x, gates)
    stack.gate = GateFunction("soft")  # multiplies by the gate, where decided ones are listed and no more
    assert torch.equal(run(stack, executor, x, gates), expected)


@pytest.mark.parametrize("executor", ["cpu", "planned"])
@pytest.mark.parametrize(("unit", "units"), [("sample", B), ("block", B * 4), ("token", B * T)])
@pytest.mark.parametrize("keys", ["all", "active"])
@pytest.mark.parametrize("branches", [1, 2])
def test_executors_agree_with_multiplied_masks(executor, unit, units, keys, branches) -> None:
    stack = stack_of(blocks(), unit=unit, keys=keys)
    x = torch.randn(B, T, D)
    for gates in (
        hard_gates(units, branches),
        hard_gates(units, branches) * torch.rand(units, L, branches).clamp(min=0.6),
    ):
        scaled = bool((gates[gates > 0] < 1).any())
        stack.gate = GateFunction("soft" if scaled else "hard_st")
        expected = run(stack, "dense_mask", x, torch.where(gates > 0.5, gates, 0.0))
        close(run(stack, executor, x, gates), expected)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize("executor", ["cpu", "planned"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 197), (2, 197)])
def test_one_sample_one_token_and_a_whole_image(executor, batch, tokens) -> None:
    stack, x = stack_of(blocks()), torch.randn(batch, tokens, D)
    gates = torch.ones(batch, L)
    gates[0, 1:3] = 0
    close(run(stack, executor, x, gates), run(stack, "dense_mask", x, gates))


@pytest.mark.parametrize("executor", ["dense_mask", "cpu", "planned"])
def test_what_is_off_is_untouched_bit_for_bit(executor) -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    assert torch.equal(run(stack, executor, x, torch.zeros(B, L)), x)
    gates = torch.zeros(B, L)
    gates[1, 2] = gates[3] = 1
    out = run(stack, executor, x, gates)
    assert torch.equal(out[[0, 2, 4]], x[[0, 2, 4]]) and not torch.equal(out[1], x[1])
    if executor != "dense_mask":  # which computes everything: 0 · NaN
        x[0] = float("nan")
        poisoned = run(stack, executor, x, gates)
        assert torch.equal(poisoned[1:], out[1:]) and poisoned[0].isnan().all()


@pytest.mark.parametrize("executor", ["cpu", "planned"])
def test_samples_may_change_places_and_company(executor) -> None:
    stack, x, gates = stack_of(blocks()), torch.randn(B, T, D), hard_gates(B)
    out, order = run(stack, executor, x, gates), torch.randperm(B)
    assert torch.equal(run(stack, executor, x[order], gates[order]), out[order])
    for b in range(B):
        torch.testing.assert_close(
            run(stack, executor, x[b : b + 1], gates[b : b + 1])[0], out[b], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("keys", ["all", "active"])
def test_tokens_may_change_places(keys) -> None:
    stack, x, gates = stack_of(blocks(), unit="token", keys=keys), torch.randn(B, T, D), hard_gates(B * T)
    out, order = run(stack, "cpu", x, gates), torch.randperm(T)
    moved = gates.unflatten(0, (B, T))[:, order].flatten(0, 1)
    close(run(stack, "cpu", x[:, order], moved), out[:, order])


def test_the_input_is_left_alone() -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    before = x.clone()
    for executor in ("cpu", "planned"):
        run(stack, executor, x, torch.ones(B, L))
        assert torch.equal(x, before)


def test_training_and_inference_are_one_function() -> None:
    router = LayerRouter(D, L, hidden=16, bias_init=0.0)
    stack = stack_of(blocks(), router=router, always_on=(0, -1))
    x = torch.randn(B, T, D)
    nn.init.normal_(router.head.weight)
    stack.train()
    trained = stack(x)
    assert stack.decision.executor == "dense_mask" and trained.requires_grad
    gates, probabilities = stack.decision.gates, stack.decision.probabilities
    assert set(gates.unique().tolist()) <= {0.0, 1.0} and (gates[:, [0, -1]] == 1).all()
    stack.eval()
    with torch.no_grad():
        close(stack(x), trained)
        assert stack.decision.executor == "cpu" and torch.equal(stack.decision.gates, gates)
        assert torch.equal(run(stack, "dense_mask", x), trained)  # to the bit by the same executor
        listed = run(stack, "planned", x)
    stack.executor, stack.sparse_train, stack.explore = "auto", True, 0.0
    assert torch.equal(stack.train()(x), listed) and stack.decision.executor == "planned"
    BudgetLoss(0.5, always_on=(0, -1))(gates, probabilities).backward()
    assert router.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("branches", [1, 2])
def test_sparse_training_has_the_gradients_of_the_dense_one(branches) -> None:
    stack, x = stack_of(blocks(), explore=0.0).train(), torch.randn(B, T, D, requires_grad=True)
    gates = hard_gates(B, branches).requires_grad_()
    parameters = [x, gates, *stack.parameters()]
    dense = torch.autograd.grad(stack(x, gates).square().sum(), parameters, allow_unused=True)
    stack.sparse_train = True
    sparse = torch.autograd.grad(stack(x, gates).square().sum(), parameters, allow_unused=True)
    assert stack.decision.executor == "planned"
    on = gates > 0.5
    torch.testing.assert_close(sparse[1][on], dense[1][on], rtol=1e-3, atol=1e-3)
    assert (sparse[1][~on] == 0).all() and (dense[1][~on] != 0).any()
    for mine, theirs in zip(sparse[2:], dense[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-3, atol=1e-3)


def test_exploration_runs_what_is_off_without_changing_anything() -> None:
    stack, x = stack_of(blocks(), sparse_train=True, explore=1.0).train(), torch.randn(B, T, D)
    gates = hard_gates(B).requires_grad_()
    out = stack(x, gates)
    assert stack.decision.plan.host_counts == ((B,),) * L
    (explored,) = torch.autograd.grad(out.square().sum(), gates)
    stack.sparse_train = False
    dense = stack(x, gates)
    close(out, dense)
    torch.testing.assert_close(explored, torch.autograd.grad(dense.square().sum(), gates)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scope", ["one", "layer", "branch"])
@pytest.mark.parametrize("unit", ["sample", "token"])
def test_soft_gates_run_above_the_threshold_of_their_own_decision(scope, unit) -> None:
    shape = {"one": (), "layer": (L, 1), "branch": (L, 2)}[scope]
    threshold = torch.rand(shape) * 0.6 + 0.2
    stack = stack_of(blocks(), unit=unit, keys="active", gate=GateFunction("soft", threshold=threshold), always_on=(0,))
    units = B if unit == "sample" else B * T
    x, gates = torch.randn(B, T, D), torch.rand(units, L, 2)
    on = gates > threshold
    on[:, 0] = True
    reference = stack_of(list(stack.children())[:L], unit=unit, keys="active", gate=GateFunction("soft"))
    kept = torch.where(on, gates, 0.0)
    kept[:, 0] = 1
    for executor in ("cpu", "planned"):
        out = run(stack, executor, x, gates)
        assert torch.equal(stack.active(stack.decision.gates), on)
        assert torch.equal(stack.decision.plan.count, on.sum(0).int())
        expected = _by_hand(reference, x, kept, on)
        close(out, expected)
        listed = stack.flops(T)
        assert listed.nominal == listed.executed  # asked for by the gates, executed by the lists


def _by_hand(stack: RoutedStack, x: torch.Tensor, gates: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """x + g · f(norm(x)) with the keys of what is on."""
    with torch.no_grad():
        for layer in range(L):
            for s, branch in enumerate(stack.branches_of(layer)):
                g = gates[:, layer, s].view(B, -1, 1)
                seen = on[:, layer, s].view(B, -1)
                x = x + g * branch.dense(x, seen=seen if seen.shape[1] > 1 else None)
    return x


def test_exploration_of_soft_gates_has_no_weight_and_a_gradient() -> None:
    stack = stack_of(blocks(), gate=GateFunction("soft", threshold=0.5), sparse_train=True, explore=1.0).train()
    x, gates = torch.randn(B, T, D), torch.rand(B, L, 1).requires_grad_()
    out = stack(x, gates)
    assert stack.decision.plan.host_counts == ((B,),) * L
    stack.explore = 0.0
    torch.testing.assert_close(out, stack(x, gates))
    (gradient,) = torch.autograd.grad(out.square().sum(), gates)
    assert (gradient != 0).all()


def test_no_decision_is_made_on_the_host() -> None:
    """Nothing is copied between host and device on the way to a plan: by shapes alone, as if on a GPU."""
    for gate in (GateFunction(), GateFunction("soft", threshold=[0.3, 0.4, 0.5, 0.6])):
        stack = stack_of(blocks(), gate=gate, always_on=(0, -1))
        with FakeTensorMode(), Devices() as seen:
            with torch.device("cuda"):
                stack.router = LayerRouter(D, L, hidden=8)
                gate.tau, gate.threshold = torch.empty(()), torch.empty(gate.threshold.shape)
                x = torch.empty(B, T, D)
            seen.crossed.clear()
            with torch.no_grad():
                gates = stack._forced_on(stack._checked(stack.route(x)[0], x))
                plan = stack.plan(x, gates, host=False)
        assert plan.index.device.type == "cuda" and plan.index.shape == (L, 1, B) and seen.crossed == []


class Devices(TorchDispatchMode):
    """Notes what moves between devices or asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors if t.dim()}) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            self.crossed.append(str(func))
        return found


def test_changed_weights_are_seen_and_names_are_those_of_the_layers() -> None:
    made, x = blocks(), torch.randn(B, T, D)
    stack = stack_of(made)
    before = run(stack, "cpu", x)
    with torch.no_grad():
        made[1].mlp.fc2.weight.mul_(2)
        made[2].ls1.gamma.add_(1)
    after = run(stack, "cpu", x)
    assert not torch.equal(before, after)
    close(after, run(stack, "dense_mask", x))
    state = nn.Sequential(*made).state_dict()
    assert set(state) == {k for k in stack.state_dict() if not k.startswith("gate.")}
    fresh = stack_of(blocks())
    run(fresh, "cpu", x)
    fresh.load_state_dict(state, strict=False, assign=True)
    close(run(fresh, "cpu", x), after)


def _step(optimizer: type[torch.optim.Optimizer], **options) -> Callable[[RoutedStack, torch.Tensor], None]:
    def change(stack: RoutedStack, x: torch.Tensor) -> None:
        stack.executor = "auto"
        stack(x).square().mean().backward()
        optimizer(stack.parameters(), lr=0.05, **options).step()

    return change


def _data(stack: RoutedStack, x: torch.Tensor) -> None:
    for parameter in stack.parameters():
        parameter.data.mul_(1.1)


def _rounded(stack: RoutedStack, x: torch.Tensor) -> None:
    stack.to(torch.bfloat16).to(torch.float32)


def _assigned(stack: RoutedStack, x: torch.Tensor) -> None:
    stack.load_state_dict({name: t.clone() * 1.1 for name, t in stack.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        _step(torch.optim.SGD, fused=True),  # raises no version of what it writes
        _step(torch.optim.AdamW, fused=True),
        _step(torch.optim.AdamW, foreach=True),
        _step(torch.optim.Adam),
        _data,
        _rounded,
        _assigned,
    ],
    ids=["fused SGD", "fused AdamW", "foreach AdamW", "Adam", ".data", "to", "assign"],
)
def test_however_weights_are_changed_it_is_seen(change) -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    before = run(stack, "cpu", x)
    change(stack, x)
    after = run(stack, "cpu", x)
    assert not torch.equal(after, before)
    close(after, run(stack, "dense_mask", x))


def test_refold_prepares_anew() -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    out = run(stack, "cpu", x)
    packs = [branch._packs for layer in range(L) for branch in stack.branches_of(layer)]
    assert all(p._made for p in packs)
    stack.refold()
    assert not any(p._made or p._folded for p in packs) and torch.equal(run(stack, "cpu", x), out)


def test_copies_are_independent() -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    before = run(stack, "cpu", x)
    for copied in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        with torch.no_grad():
            copied.get_parameter("0.mlp.fc1.weight").zero_()
        assert not torch.equal(run(copied, "cpu", x), before)
        close(run(copied, "cpu", x), run(copied, "dense_mask", x))
    assert torch.equal(run(stack, "cpu", x), before)


def test_a_stack_can_be_copied_after_a_pass_that_recorded_a_gradient() -> None:
    stack = stack_of(blocks(), router=LayerRouter(D, L, hidden=8))
    stack(torch.randn(B, T, D)).sum().backward()
    assert stack.decision.gates.requires_grad
    twin = copy.deepcopy(stack)
    assert torch.equal(twin.decision.gates, stack.decision.gates) and not twin.decision.gates.requires_grad
    assert torch.equal(twin.decision.probabilities, stack.decision.probabilities)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype) -> None:
    stack, x, gates = stack_of(blocks()).to(dtype), torch.randn(B, T, D).to(dtype), hard_gates(B)
    expected = run(stack, "dense_mask", x, gates)
    tolerance = 1e-10 if dtype == torch.float64 else 6e-2
    for executor in ("cpu", "planned"):
        out = run(stack, executor, x, gates)
        assert out.dtype == dtype and float((out - expected).norm() / expected.norm()) < tolerance


def test_any_module_behind_a_norm_and_any_norm_before_it() -> None:
    inner, norm = nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.GroupNorm(4, D)

    class ByToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.flatten(0, 1)).view_as(x)

    mixing = nn.MultiheadAttention(D, 2, batch_first=True)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = mixing

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    layer = nn.ModuleList([ByToken(), inner, Attend()])
    rows = (ModuleBranch(layer[0], layer[1], rowwise=True), ModuleBranch(nn.LayerNorm(D), layer[2]))
    stack = RoutedStack([layer], [rows], always_on=()).eval()
    x, gates = torch.randn(B, T, D), torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]])
    expected = run(stack, "dense_mask", x, gates)
    for executor in ("cpu", "planned"):
        close(run(stack, executor, x, gates), expected)
    stack.unit = "token"
    with pytest.raises(ValueError, match="mixes the tokens of a sample.*unit='sample'"):
        run(stack, "cpu", x, torch.ones(B * T, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "tokens"}, "Did you mean 'token'"),
        ({"keys": "some"}, "keys"),
        ({"executor": "gpu"}, "executor"),
        ({"explore": 1.5}, r"explore is a fraction in \[0, 1\], got 1.5"),
        ({"always_on": (7,)}, "always_on names layer 7, but the stack has layers 0 to 3"),
        ({"router": LayerRouter(D, 3)}, "decides for 3 layers, the stack has 4"),
        ({"router": LayerRouter(D, L, 3)}, "3 decisions per layer, the layers have 2"),
        ({"router": LayerRouter(D, L, pool="none")}, "decides per token"),
    ],
)
def test_what_cannot_be_a_stack_is_told(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        stack_of(blocks(), **options)
    with pytest.raises(ValueError, match="needs layers with residual branches, got 0 layers"):
        RoutedStack([], [])


def test_bad_inputs_are_told() -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    cases = [
        (x[0], None, ValueError, r"takes \[B, T, D\], got \[12, 32\]"),
        (x, torch.ones(B, 3), ValueError, r"gates must be \[5, 4\] or \[5, 4, 2\] .* got \[5, 3, 1\]"),
        (x, torch.ones(B - 1, L), ValueError, r"got \[4, 4, 1\]"),
        (x, torch.ones(B, L, dtype=torch.bool), TypeError, "use gates.float"),
        (x, torch.full((B, L), float("nan")), ValueError, "NaN or outside"),
        (x, torch.full((B, L), 2.0), ValueError, "NaN or outside"),
    ]
    for given, gates, error, message in cases:
        with torch.no_grad(), pytest.raises(error, match=message):
            stack(given, gates)
        stack.executor = "dense_mask"
        with torch.no_grad(), pytest.raises(error, match=message):
            stack(given, gates)
        stack.executor = "auto"
    with pytest.raises(RuntimeError, match="executor='cpu' has no gradient"):
        run_with_gradient(stack, "cpu", x)
    with pytest.raises(RuntimeError, match="executor='list' keeps counts on a GPU"):
        run(stack, "list", x)
    for executor in ("graph", "switch"):
        with pytest.raises(RuntimeError, match=f"executor='{executor}' replays CUDA graphs"):
            run(stack, executor, x)


def test_skipping_nothing_in_eval_mode_is_told_once(caplog) -> None:
    stack, x = stack_of(blocks()), torch.randn(B, T, D)
    for _ in range(2):
        stack(x)
    assert caplog.text.count("call it under torch.no_grad()") == 1
    with torch.no_grad():
        stack(x)
    assert stack.decision.executor == "cpu"


def run_with_gradient(stack: RoutedStack, executor: str, x: torch.Tensor) -> torch.Tensor:
    stack.executor = executor
    return stack(x)
