"""route() on timm models and lists of blocks: the same function with all gates 1, the executors' agreement, its errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import GatedMlp, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

from xdfast.nn import GateFunction, LayerRouter, fixed_gates, route, routed_stacks, whole_block
from xdfast.nn.branches import AttentionBranch, MLPBranch, ModuleBranch, Norm

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_classes": 7}
VIT = {**SMALL, "depth": 4, "num_heads": 4}
SILU = {"act_layer": nn.SiLU}

#: name → (model, kinds of branches). DeiT III and DINOv2 are these classes with these options.
MODELS = {
    "vit": (lambda: VisionTransformer(**VIT), (AttentionBranch, MLPBranch)),
    "norms": (lambda: VisionTransformer(**VIT, qk_norm=True, scale_attn_norm=True), (AttentionBranch, MLPBranch)),
    "deit3": (
        lambda: VisionTransformer(**VIT, no_embed_class=True, init_values=1e-6),
        (AttentionBranch, MLPBranch),
    ),
    "dinov2": (
        lambda: VisionTransformer(**VIT, init_values=1e-5, reg_tokens=4, drop_path_rate=0.1),
        (AttentionBranch, MLPBranch),
    ),
    "dinov2 giant": (
        lambda: VisionTransformer(**VIT, **SILU, init_values=1e-5, mlp_layer=SwiGLUPacked, mlp_ratio=5.5),
        (AttentionBranch, MLPBranch),
    ),
    "swiglu": (lambda: VisionTransformer(**VIT, **SILU, mlp_layer=SwiGLU), (AttentionBranch, MLPBranch)),
    "geglu": (lambda: VisionTransformer(**VIT, mlp_layer=SwiGLU), (AttentionBranch, ModuleBranch)),
    "eva": (
        lambda: Eva(**VIT, use_rot_pos_emb=True, swiglu_mlp=True, init_values=1e-5),
        (ModuleBranch, MLPBranch),
    ),
    "beit": (lambda: Beit(**VIT, init_values=0.1, use_shared_rel_pos_bias=True), (ModuleBranch, MLPBranch)),
    "mixer": (lambda: MlpMixer(**SMALL, num_blocks=4), (ModuleBranch, MLPBranch)),
    "resmlp": (
        lambda: MlpMixer(**SMALL, num_blocks=4, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4.0),
        (ModuleBranch, ModuleBranch),
    ),
    "gmlp": (
        lambda: MlpMixer(**SMALL, num_blocks=4, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4.0),
        (ModuleBranch,),
    ),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str = "vit") -> nn.Module:
    """A model whose scales, norms and biases all matter."""
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_all_gates_one_is_the_original(name) -> None:
    model = made(name)
    student = route(model, 0.6)
    stack = routed_stacks(student)[0]
    assert tuple(type(branch) for branch in stack.branches_of(1)) == MODELS[name][1]
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), fixed_gates(student, torch.ones(3, 4)):
        expected, logits = model.forward_features(x), model(x)
        for executor, tolerance in (("dense_mask", 0), ("cpu", 5e-6), ("planned", 5e-6)):
            stack.executor = executor
            assert error(student.forward_features(x), expected) <= tolerance, executor
            assert error(student(x), logits) <= 4 * tolerance if logits.any() else not student(x).any()
            final, states = student.forward_intermediates(x)
            for state, wanted in zip((final, *states), (expected, *model.forward_intermediates(x)[1])):
                assert error(state, wanted) <= tolerance
    with torch.no_grad():  # and a new router leaves nearly all on
        student(x)
    assert stack.decision.gates.mean() > 0.9
    assert set(model.state_dict()) == {
        k for k in student.state_dict() if ".router." not in k and ".gate." not in k[6:13]
    }


@pytest.mark.parametrize("name", MODELS)
def test_executors_agree_on_any_gates_of_samples(name) -> None:
    model = made(name)
    count = len(MODELS[name][1])
    student = route(model, 0.6, branches=count, always_on=())
    stack = routed_stacks(student)[0]
    x, gates = torch.randn(5, 3, 32, 32), (torch.rand(5, 4, count) > 0.5).float()
    gates[0], gates[:, 2] = 0, 0  # a sample and a layer that are left out altogether
    results, states = {}, {}
    with torch.no_grad(), fixed_gates(student, gates):
        for executor in ("dense_mask", "cpu", "planned"):
            stack.executor = executor
            results[executor] = student.forward_features(x)
            states[executor] = student.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for executor in ("cpu", "planned"):
        assert error(results[executor], results["dense_mask"]) < 5e-6
        for state, wanted in zip(states[executor], states["dense_mask"]):
            assert error(state, wanted) < 5e-6


@pytest.mark.parametrize("unit", ["token", "block"])
def test_tokens_and_blocks_of_tokens(unit) -> None:
    model = made("dinov2")  # 16 + 1 + 4 tokens
    student = route(model, 0.6, unit=unit, router={"block_rows": 7} if unit == "block" else None).eval()
    stack = routed_stacks(student)[0]
    x, units = torch.randn(2, 3, 32, 32), 2 * (21 if unit == "token" else 3)
    with torch.no_grad():
        student(x)
        assert stack.decision.gates.shape == (units, 4, 1)
        with fixed_gates(student, (torch.rand(units, 4) > 0.5).float()):
            y = student.forward_features(x)
            stack.executor = "dense_mask"
            assert error(y, student.forward_features(x)) < 5e-6


def test_the_original_stays_and_copy_false_changes_it() -> None:
    model = made()
    names = set(model.state_dict())
    assert route(model) is not model and set(model.state_dict()) == names and not routed_stacks(model)
    assert route(model, copy=False) is model and len(routed_stacks(model)) == 1
    with pytest.raises(ValueError, match="routed already"):
        route(model)


def test_a_stack_of_its_own_and_one_inside_another_model() -> None:
    blocks = nn.Sequential(*[Block(24, 2) for _ in range(3)]).eval()
    student = route(blocks, 0.8)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert error(student(x, torch.ones(2, 3)), blocks(x)) < 1e-6
    assert student.xdfast_route.tokens == 256 and student.xdfast_route.blocks == ""
    both = nn.ModuleDict({"a": nn.Sequential(Block(24, 2)), "b": nn.ModuleList([Block(24, 2), Block(24, 2)])})
    with pytest.raises(ValueError, match="2 lists of residual layers, 'a', 'b'; say which"):
        route(both, 1.0)
    with pytest.raises(ValueError, match="with describe say which layers: blocks= one of 'a', 'b'"):
        route(both, 1.0, describe=whole_block)
    assert route(both, 1.0, blocks="b").xdfast_route.blocks == "b"
    with pytest.raises(ValueError, match="no list of layers 'c'; it has 'a', 'b'"):
        route(both, 1.0, blocks="c")


def test_other_layers_are_described() -> None:
    model = VisionTransformer(**VIT, block_fn=ParallelScalingBlock).eval()
    with pytest.raises(ValueError, match="no list of residual layers.*ParallelScalingBlock"):
        route(model)
    student = route(model, 0.6, blocks="blocks", describe=whole_block)
    x, gates = torch.randn(4, 3, 32, 32), (torch.rand(4, 4) > 0.5).float()
    with torch.no_grad():
        with fixed_gates(student, torch.ones(4, 4)):
            assert error(student(x), model(x)) < 5e-6
        with fixed_gates(student, gates):
            y = student(x)
            routed_stacks(student)[0].executor = "dense_mask"
            assert error(y, student(x)) < 5e-6
    assert student.xdfast_route.described


def test_a_block_that_is_no_sum_of_its_parts_is_refused() -> None:
    class Scaled(Block):
        def forward(self, x):
            return 2 * super().forward(x)

    class Square(Block):
        def forward(self, x):
            return super().forward(x.unflatten(1, (16, 16)))

    with pytest.raises(ValueError, match="layer 0, Scaled, computes something else.*whole_block"):
        route(nn.Sequential(*[Scaled(24, 2) for _ in range(3)]), 1.0)
    with pytest.raises(ValueError, match="layer 0, Square, does not take .B, T, D. = .2, 5, 24."):
        route(nn.Sequential(*[Square(24, 2) for _ in range(3)]), 1.0)


def test_norms_are_asked_what_they_compute() -> None:
    class OneMoreRMSNorm(nn.Module):  # as Gemma's
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x):
            return nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    with pytest.raises(ValueError, match="something else than rms norm"):
        Norm(OneMoreRMSNorm())
    for norm in (
        nn.LayerNorm(8),
        nn.LayerNorm(8, bias=False),
        nn.RMSNorm(8),
        nn.LayerNorm(8, elementwise_affine=False),
    ):
        assert Norm(norm.to(torch.bfloat16)).kind in ("layer", "rms")
    assert Norm(nn.RMSNorm(8, device="meta")).kind == "rms"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_flops": 0}, "target_flops"),
        ({"target_flops": 1.2}, r"in \(0, 1\]"),
        ({"target_flops": 0.3}, "cannot be reached.*always on"),
        ({"always_on": (7,)}, "always_on names layers of 0 to 3"),
        ({"branches": 3}, "branches is 1, or the number"),
        ({"unit": "patch"}, "unit"),
        ({"gate": "top"}, "kind"),
        ({"router": LayerRouter(48, 5)}, "decides for 5 layers"),
        ({"router": {"pool": "none"}}, "decides per token"),
    ],
)
def test_options_that_do_not_go(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        route(made(), **options)


def test_models_and_inputs_that_do_not_go() -> None:
    with pytest.raises(ValueError, match="Sequential has no list of residual layers.*Conv2d, ReLU"):
        route(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="Linear has no list of residual layers.*hold nothing"):
        route(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="unit='token' needs attention.*EvaBlock"):
        route(made("eva"), 0.6, unit="token")
    with pytest.raises(ValueError, match="sparse_train computes listed rows without DropPath"):
        route(made("dinov2"), 0.6, sparse_train=True)
    student = route(made(), 0.6)
    x = torch.randn(2, 3, 32, 32)
    for gates, message in (
        (torch.ones(2, 3), r"gates must be \[2, 4\]"),
        (torch.ones(3, 4), r"got \[3, 4, 1\]"),
        (torch.full((2, 4), float("nan")), "NaN"),
    ):
        with torch.no_grad(), fixed_gates(student, gates), pytest.raises(ValueError, match=message):
            student(x)
    with fixed_gates(student, torch.ones(2, 4, dtype=torch.long)), pytest.raises(TypeError, match="use gates.float"):
        student(x)
    with pytest.raises(ValueError, match="called with attn_mask="):
        student.forward_features(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="called with is_causal="):
        student.forward_features(x, is_causal=True)
    with pytest.raises(ValueError, match="one routed stack"), fixed_gates(made(), torch.ones(2, 4)):
        pass


def test_a_stack_is_a_list_of_layers() -> None:
    model = made()
    student = route(model, 0.6)
    blocks = student.blocks
    assert len(blocks) == 4 and len(blocks[:2]) == 2 and blocks[-1] is blocks.get_submodule("3")
    assert [step.attn.num_heads for step in blocks] == [4] * 4  # a step's attributes are its layer's
    x = torch.randn(2, 17, 48)
    with pytest.raises(RuntimeError, match="before layer 0"):
        list(blocks)[1](x)
    with pytest.raises(ValueError, match="only the first layers"):
        blocks[1:]
    with pytest.raises(TypeError, match="keyword"):
        next(iter(blocks))(x, None)
    seen = []
    blocks[2].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        student(torch.randn(2, 3, 32, 32))
    assert seen[0][1].shape == (2, 17, 48) and not torch.equal(*seen[0])


def test_training_is_timms_own_with_a_gradient_for_every_gate() -> None:
    model = made("dinov2").train()
    student = route(model, 0.6).train()
    x = torch.randn(6, 3, 32, 32)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with fixed_gates(student, torch.ones(6, 4)):
        assert torch.equal(student(x), expected)  # DropPath included
    loss = student(x).square().sum()
    loss.backward()
    stack = routed_stacks(student)[0]
    assert stack.decision.executor == "dense_mask"
    assert (stack.router.head.bias.grad[1:3] != 0).all()
    assert all(parameter.grad is not None for parameter in stack.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    student = route(made("dinov2"), 0.6)
    x = torch.randn(3, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        student.set_grad_checkpointing(checkpointing)
        student.zero_grad()
        student(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_sparse_training_has_the_gradients_of_what_ran() -> None:
    student = route(made(), 0.6, sparse_train=True, explore=0.0).train()
    stack = routed_stacks(student)[0]
    x, gates = torch.randn(4, 3, 32, 32), (torch.rand(4, 4) > 0.5).float()
    gradients = []
    for executor in ("auto", "dense_mask"):
        stack.executor = executor
        student.zero_grad()
        with fixed_gates(student, gates):
            student(x).square().sum().backward()
        gradients.append(student.blocks[1].mlp.fc1.weight.grad.clone())
    assert error(*gradients) < 1e-4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(how) -> None:
    student = route(made("mixer"), 0.6).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = student.forward_features(x)
        twin = how(student)
        assert torch.equal(twin.forward_features(x), before)
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert not torch.equal(twin.forward_features(x), before)
        assert torch.equal(student.forward_features(x), before)
    assert twin.xdfast_route == student.xdfast_route
    other = route(made("mixer"), 0.6).eval()
    other.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(other.forward_features(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dinov2", "eva", "resmlp"])
def test_other_precisions(name, dtype) -> None:
    model = made(name).to(dtype)
    x, gates = torch.randn(4, 3, 32, 32, dtype=dtype), (torch.rand(4, 4) > 0.4).float()
    late, early = route(made(name), 0.6).to(dtype), route(model, 0.6)
    late.load_state_dict(early.state_dict())
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for student in (late, early):
        assert student.blocks.gate.threshold.dtype == torch.float32
        with torch.no_grad():
            student(x)
            with fixed_gates(student, gates):
                y = student.forward_features(x)
                student.blocks.executor = "dense_mask"
                assert error(y, student.forward_features(x)) < tolerance
                assert y.dtype == dtype
            with fixed_gates(student, torch.ones(4, 4)):
                assert torch.equal(student.forward_features(x), model.forward_features(x)) or student is late


def test_an_own_gate_and_router() -> None:
    router = LayerRouter(48, 4, 2, hidden=8, groups=[(0, 1), (1, None)])
    student = route(
        made(), 0.7, branches=2, gate=GateFunction("soft", threshold=0.3), router=router, always_on=()
    ).eval()
    stack = routed_stacks(student)[0]
    with torch.no_grad():
        student(torch.randn(2, 3, 32, 32))
    assert stack.decision.gates.shape == (2, 4, 2) and stack.decision.gates.max() < 1
    assert student.xdfast_route.options["router"]["groups"] == [[0, 1], [1, None]]
    costs = torch.tensor(student.xdfast_route.costs)
    assert costs.shape == (4, 2) and (costs[:, 1] > costs[:, 0]).all()
