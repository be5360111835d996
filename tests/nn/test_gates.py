"""Gates: exact values, gradients, noise, schedule; the published gating disagrees with itself, ours does not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xdfast.nn import GateFunction, GateSchedule
from xdfast.nn.actdistill_compat import actdistill_inference, actdistill_training
from xdfast.nn.gates import GATES, gumbel, gumbel_st, hard_st, soft

# what a router's logits can be, with the ends of sigmoid in float32
LOGITS = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(1)) * 4, torch.tensor([-200.0, 0, 200])])


@pytest.mark.parametrize("threshold", [0.5, 0.1, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hard_st_is_exactly_the_decision_with_the_gradient_of_p(threshold, dtype) -> None:
    z = LOGITS.to(dtype).requires_grad_()
    g, p = hard_st(z, 0.7, threshold), torch.sigmoid(z.detach().to(torch.promote_types(dtype, torch.float32)) / 0.7)
    assert torch.equal(g, (p > threshold).to(g.dtype))
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    grad = torch.autograd.grad(g.sum(), z)[0]
    assert torch.equal(grad, torch.autograd.grad(soft(z, 0.7).sum(), z)[0])


def test_a_nan_logit_stays_nan() -> None:
    z = torch.tensor([float("nan"), 1.0])
    for kind in GATES:
        assert GateFunction(kind).train()(z).isnan().tolist() == [True, False]
        assert GateFunction(kind).eval()(z).isnan().tolist() == [True, False]


def test_soft_gates_pass_gradcheck() -> None:
    z = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft(x, 0.5), z)
    assert torch.autograd.gradcheck(lambda x: gumbel(x, 0.5, torch.Generator().manual_seed(0)), z)


@pytest.mark.parametrize("kind", ["hard_st", "soft"])
def test_training_computes_what_evaluation_computes(kind) -> None:
    gate = GateFunction(kind, tau=0.5, threshold=[0.5, 0.2, 0.9])
    z = torch.randn(64, 3, 2)
    assert torch.equal(gate.train()(z), gate.eval()(z))


@pytest.mark.parametrize("kind", ["gumbel", "gumbel_st"])
def test_evaluation_is_without_noise(kind) -> None:
    gate, z = GateFunction(kind, tau=0.5), torch.randn(64, 3, 2)
    assert not torch.equal(gate(z), gate(z))
    gate.eval()
    assert torch.equal(gate(z), gate(z))
    expected = (z > 0).float() if kind == "gumbel_st" else torch.sigmoid(z / 0.5)
    assert torch.equal(gate(z), expected)


def test_noise_is_seeded_and_above_a_half_as_often_as_p_says() -> None:
    z = torch.full((40000,), 0.8)
    a, b = (gumbel_st(z, 2.0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert set(a.tolist()) == {0.0, 1.0}
    assert a.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.01)
    # the lower the temperature, the nearer to 0 and 1
    spread = [(gumbel(z, tau, torch.Generator().manual_seed(3)) - 0.5).abs().mean() for tau in (2.0, 0.5, 0.1)]
    assert spread == sorted(spread)


def test_noise_at_the_ends_of_rand_is_finite(monkeypatch) -> None:
    for end in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand_like", lambda x, end=end: torch.full_like(x, end))
        z = torch.zeros(4, requires_grad=True)
        assert torch.autograd.grad(gumbel(z, 0.5).sum(), z)[0].isfinite().all()


def test_thresholds_per_layer_and_branch() -> None:
    p = torch.rand(10, 3, 2)
    z = torch.logit(p, eps=1e-6)
    per_branch = torch.rand(3, 2)
    assert torch.equal(GateFunction(threshold=per_branch)(z), (soft(z) > per_branch).float())
    assert torch.equal(
        GateFunction(threshold=[0.1, 0.5, 0.9])(z), (soft(z) > torch.tensor([[0.1], [0.5], [0.9]])).float()
    )


def test_decisions_travel_with_the_weights_and_survive_half_precision() -> None:
    threshold = torch.tensor([[0.1234567], [0.7654321]])
    trained = GateFunction(tau=0.3).set(threshold=threshold)
    fresh = GateFunction()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.threshold, threshold)
    assert fresh.tau.item() == pytest.approx(0.3)
    assert torch.equal(copy.deepcopy(fresh).bfloat16().threshold, threshold)
    assert fresh.half().double().threshold.dtype == torch.float32


def test_scale_says_how_to_run_it() -> None:
    assert [GateFunction(kind).scale for kind in GATES] == ["hard", "scaled", "scaled", "hard"]


def test_schedule_is_soft_first_and_cools_without_a_jump() -> None:
    schedule, gate = GateSchedule("gumbel_st", warmup_steps=10, steps=40), GateFunction()
    stages = [schedule(step) for step in range(60)]
    assert [stage.kind for stage in stages] == ["soft"] * 10 + ["gumbel_st"] * 50
    taus = [stage.tau for stage in stages]
    assert taus == sorted(taus, reverse=True)
    assert taus[0] == 2.0
    assert taus[40:] == pytest.approx([0.5] * 20)
    assert max(a / b for a, b in itertools.pairwise(taus)) == pytest.approx(4 ** (1 / 40))
    before = gate.tau
    gate.set(*schedule(40))
    assert (gate.kind, gate.tau.item()) == ("gumbel_st", 0.5)
    assert gate.tau is before  # the same tensor: a compiled or captured model sees the new value


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'hard'.*Did you mean 'hard_st'"):
        GateFunction("hard")
    with pytest.raises(ValueError, match="tau must be finite and > 0, got 0"):
        GateFunction(tau=0)
    with pytest.raises(ValueError, match="tau must be finite and > 0, got -1"):
        soft(torch.zeros(2), -1)
    for wrong in (1.5, float("nan"), [0.5, -0.1]):
        with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
            GateFunction(threshold=wrong)
    with pytest.raises(ValueError, match=r"got shape \[1, 2, 3\]"):
        GateFunction(threshold=torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64"):
        GateFunction()(torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"floating-point tensor, got list"):
        gumbel([1.0])
    with pytest.raises(ValueError, match="generator must be on the logits' device, meta"):
        gumbel(torch.zeros(2, device="meta"), generator=torch.Generator())
    with pytest.raises(ValueError, match="warmup_steps=5, steps=4"):
        GateSchedule(warmup_steps=5, steps=4)
    with pytest.raises(ValueError, match="pair"):
        GateSchedule(tau=(2.0, 1.0, 0.5))


class Stack:
    """A random pre-RMSNorm stack in fp64, and what follows it: a final RMSNorm."""

    def __init__(self, layers: int, width: int = 32) -> None:
        make = torch.Generator().manual_seed(0)
        self.weights = [
            (
                torch.randn(4 * width, width, generator=make, dtype=torch.double) / width**0.5,
                torch.randn(width, 4 * width, generator=make, dtype=torch.double) / (4 * width) ** 0.5 / 2,
            )
            for _ in range(layers)
        ]
        self.width = width

    def branch(self, x: Tensor, layer: int) -> Tensor:
        up, down = self.weights[layer]
        return F.gelu(F.rms_norm(x, (self.width,)) @ up.T) @ down.T

    @property
    def layers(self) -> list:
        return [lambda x, layer=layer: x + self.branch(x, layer) for layer in range(len(self.weights))]

    def gated(self, x: Tensor, gates: Tensor) -> Tensor:
        for layer in range(len(self.weights)):
            x = x + gates[:, layer, None, None] * self.branch(x, layer)
        return x

    def final(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,))


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


@pytest.mark.parametrize("low", [0.05, 0.001])
def test_published_gating_trains_one_function_and_runs_another(low) -> None:
    stack, x = Stack(layers=24), torch.randn(16, 4, 32, dtype=torch.double)
    gates = torch.where(torch.rand(16, 24) < 0.5, low, 1 - low).double()
    run = stack.final(actdistill_inference(stack.layers, x, gates))
    assert cosine(stack.final(actdistill_training(stack.layers, x, gates)), run) < 0.2
    assert cosine(stack.final(stack.gated(x, gates)), run) > 0.98
    assert cosine(stack.final(stack.gated(x, gates.round())), run) == pytest.approx(1, abs=1e-12)


def test_gated_residual_is_the_routed_forward_at_0_and_1_exactly() -> None:
    stack, x = Stack(layers=8), torch.randn(16, 4, 32, dtype=torch.double)
    gates = (torch.rand(16, 8) < 0.5).double()
    assert torch.equal(stack.gated(x, gates), actdistill_inference(stack.layers, x, gates))
    assert not torch.allclose(actdistill_training(stack.layers, x, gates), actdistill_inference(stack.layers, x, gates))


def test_last_gate_learns_through_a_final_norm_only_with_the_gated_residual() -> None:
    stack, x = Stack(layers=16), torch.randn(4, 4, 32, dtype=torch.double)
    # gates above a half: the state keeps a norm at which RMSNorm's epsilon is nothing
    gates = (0.5 + 0.5 * torch.rand(4, 16, dtype=torch.double)).requires_grad_()
    direction = torch.randn(32, dtype=torch.double)

    def norms(output: Tensor) -> Tensor:
        return torch.autograd.grad((F.rms_norm(output, (32,), eps=0.0) @ direction).sum(), gates)[0].norm(dim=0)

    published, ours = norms(actdistill_training(stack.layers, x, gates)), norms(stack.gated(x, gates))
    assert published[-1] < 1e-10 * published[:-1].max()
    assert ours[-1] > 1e-2 * ours.max()


def test_published_gating_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"gates \[B, L\] with L=2 layers, got \[3, 1, 4\] and \[3, 3\]"):
        actdistill_inference([torch.relu] * 2, torch.zeros(3, 1, 4), torch.zeros(3, 3))
