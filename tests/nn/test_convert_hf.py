"""route() on Hugging Face decoders: the same function with all gates 1, KV caches whose gates are fixed at the prompt."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from xdfast.nn import fixed_gates, route, routed_stacks
from xdfast.nn.branches import MLPBranch, ModuleBranch
from xdfast.nn.convert_hf import _chosen

transformers = pytest.importorskip("transformers")

LAYERS = 5
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"head_dim": 12, "sliding_window": 6}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

#: class → (options of its configuration, kind of its MLP branch, layers that are always on)
DECODERS = {
    "Llama": ({}, MLPBranch, (0, 4)),
    "Qwen2": ({}, MLPBranch, (0, 4)),
    "Qwen3": ({"head_dim": 12}, MLPBranch, (0, 4)),
    "SmolLM3": ({}, MLPBranch, (0, 4)),
    "Mistral": ({"sliding_window": 6}, MLPBranch, (0, 4)),
    "Phi3": ({}, MLPBranch, (0, 4)),
    "Gemma": ({"head_dim": 12}, ModuleBranch, (0, 4)),  # GeGLU, and norms that multiply by 1 + weight
    "Gemma2": (GEMMA, ModuleBranch, (0, 1, 4)),  # and norms after the branches; two kinds of attention
    "Gemma3": ({**GEMMA, "layer_types": KINDS}, ModuleBranch, (0, 2, 4)),
    "Olmo2": ({}, ModuleBranch, (0, 4)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str = "Llama", **options) -> nn.Module:
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES, **DECODERS.get(name, ({},))[0], **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Four prompts of 9, 6, 8 and 9 tokens, padded on the left."""
    ids, mask = torch.randint(3, 97, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1, :3], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def gates_of(batch: int, branches: int = 1) -> torch.Tensor:
    gates = (torch.rand(batch, LAYERS, branches) > 0.5).float()
    gates[:, 3] = 0  # a layer that nobody takes
    gates[0, 1], gates[1, 1] = 0, 1
    return gates


def error(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    real = mask.bool()
    return float((a - b)[real].abs().max() / b[real].abs().max())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_all_gates_one_is_the_original(name, prompts) -> None:
    model = made(name)
    student = route(model, 0.8)
    stack = routed_stacks(student)[0]
    assert isinstance(stack.branches_of(1)[1], DECODERS[name][1]) and stack.always_on == DECODERS[name][2]
    expected = model(**prompts, output_hidden_states=True)
    mask = prompts["attention_mask"]
    for executor, tolerance in (("dense_mask", 0), ("cpu", 5e-6), ("planned", 5e-6)):
        stack.executor = executor
        with fixed_gates(student, torch.ones(4, LAYERS)):
            found = student(**prompts, output_hidden_states=True)
        assert error(found.logits, expected.logits, mask) <= tolerance
        assert len(found.hidden_states) == LAYERS + 1
        for a, b in zip(found.hidden_states, expected.hidden_states):
            assert error(a, b, mask) <= tolerance
    names = {
        name for name in student.state_dict() if not name.startswith(("model.layers.router.", "model.layers.gate."))
    }
    assert names == set(model.state_dict())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_is_one_full_pass_with_the_same_gates(name, prompts) -> None:
    student = route(made(name), 0.8, branches=2)
    stack, ids, mask = routed_stacks(student)[0], prompts["input_ids"], prompts["attention_mask"]
    full = {}
    for executor in ("dense_mask", "cpu", "planned"):
        stack.executor = executor
        with fixed_gates(student, gates_of(4, 2)):
            full[executor] = student(**prompts, use_cache=False).logits
            first = student(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        pieces, cache = [first.logits], first.past_key_values  # gates are no longer given: the cache has them
        for stop in (8, 9):
            start = cache.get_seq_length()
            more = student(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            pieces.append(more.logits)
        assert error(torch.cat(pieces, 1), full[executor], mask) < 5e-6
        torch.manual_seed(0)
    if stack.executor == "planned":
        lengths = [getattr(layer, "keys", None) for layer in cache.layers]
        held = [0 if keys is None else keys.shape[0] for keys in lengths]
        assert held == [int((stack.decision.gates[:, number, 0] > 0.5).sum()) for number in range(LAYERS)]


@torch.no_grad()
def test_executors_agree(prompts) -> None:
    student, gates = route(made(), 0.8), gates_of(4)
    stack, results = routed_stacks(student)[0], []
    with fixed_gates(student, gates):
        for executor in ("dense_mask", "cpu", "planned"):
            stack.executor = executor
            results.append(student(**prompts).logits)
    assert error(results[1], results[0], prompts["attention_mask"]) < 5e-6
    assert error(results[2], results[0], prompts["attention_mask"]) < 5e-6


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
@torch.no_grad()
def test_generate(name, prompts) -> None:
    model = made(name)
    student = route(model, 0.8)
    options = {"max_new_tokens": 8, "do_sample": False}
    for beams in (1, 3):
        with fixed_gates(student, torch.ones(4 * beams, LAYERS)):
            tokens = student.generate(**prompts, **options, num_beams=beams)
        assert torch.equal(tokens, model.generate(**prompts, **options, num_beams=beams))
        # reordered beams keep their gates and their rows of the cache
        with fixed_gates(student, gates_of(4).repeat_interleave(beams, 0)):
            cached = student.generate(**prompts, **options, num_beams=beams)
            assert torch.equal(cached, student.generate(**prompts, **options, num_beams=beams, use_cache=False))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_decision_does_not_depend_on_the_padding(implementation, prompts) -> None:
    student = route(made(attn_implementation=implementation), 0.8)
    stack = routed_stacks(student)[0]
    stack.router.head.weight.normal_()
    student(**prompts)
    together = stack.decision.probabilities
    for number, start in enumerate((0, 3, 1, 0)):
        student(prompts["input_ids"][number : number + 1, start:])
        torch.testing.assert_close(stack.decision.probabilities[0], together[number], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gates_cannot_change_in_mid_sequence(prompts) -> None:
    student, gates = route(made(), 0.8), gates_of(4)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]

    def prefilled():
        with fixed_gates(student, gates):
            return student(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values

    later = {"input_ids": ids[:, 6:], "attention_mask": mask}
    for value, word in ((1, "on"), (0, "off")):
        changed = gates.clone()
        changed[1 - value, 1] = value  # sequence 0 skips layer 1, sequence 1 takes it
        with (
            fixed_gates(student, changed),
            pytest.raises(ValueError, match=f"layer 1 cannot be turned {word} for sequence"),
        ):
            student(**later, past_key_values=prefilled())
    with fixed_gates(student, gates):
        student(**later, past_key_values=prefilled())
    with pytest.raises(ValueError, match="holds 4 sequences, the input has 2"):
        student(ids[:2, 6:], past_key_values=prefilled())
    other = made()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without this routed model"):
        student(**later, past_key_values=other)
    with pytest.raises(ValueError, match=r"gates must be \[4, 5\]"), fixed_gates(student, torch.ones(3, LAYERS)):
        student(**prompts)


@torch.no_grad()
def test_caches_are_copied_selected_and_freed(prompts) -> None:
    student, gates = route(made(), 0.8), gates_of(4)
    ids = prompts["input_ids"]
    with fixed_gates(student, gates):
        cache = student(ids[:, :6], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    expected = student(ids[:, 6:], past_key_values=cache).logits
    kept = torch.tensor([3, 0])
    twin.batch_select_indices(kept)
    twin.batch_repeat_interleave(2)
    found = student(ids[[3, 3, 0, 0], 6:], past_key_values=twin).logits
    torch.testing.assert_close(found, expected[[3, 3, 0, 0]], rtol=1e-5, atol=1e-5)
    assert cache.xdfast_route.gates.shape[0] == 4 and twin.xdfast_route.gates.shape[0] == 4
    gc.disable()  # keys must go with the last reference to the cache
    try:
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_training(prompts) -> None:
    model = made().train()
    student = route(model, 0.8)
    stack = routed_stacks(student)[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        loss = student(**prompts, labels=prompts["input_ids"]).loss
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None])
    assert stack.decision.executor == "dense_mask" and (stack.router.head.bias.grad[1:4] != 0).all()
    assert len(gradients[0]) == len(gradients[1])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sparse_training_has_the_gradients_of_what_ran(prompts) -> None:
    student = route(made(), 0.8, sparse_train=True, explore=0.0).train()
    stack, gates, gradients = routed_stacks(student)[0], gates_of(4), []
    for executor in ("auto", "dense_mask"):
        stack.executor = executor
        student.zero_grad()
        with fixed_gates(student, gates):
            student(**prompts, labels=prompts["input_ids"], use_cache=False).loss.backward()
        gradients.append(student.model.layers[1].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, prompts) -> None:
    for student in (route(made(), 0.8).to(dtype), route(made().to(dtype), 0.8)):
        student.generate(**prompts, max_new_tokens=3, do_sample=False)
        with fixed_gates(student, gates_of(4)):
            assert student(**prompts).logits.isfinite().all()


def test_decoders_that_do_not_go() -> None:
    with pytest.raises(ValueError, match="unit='token' needs attention"):
        route(made(), 0.8, unit="token")
    with pytest.raises(ValueError, match="Granite.* computes something else"):
        route(made("Granite", residual_multiplier=0.5), 0.8)
    with pytest.raises(ValueError, match="no list of residual layers.*CohereDecoderLayer"):
        route(made("Cohere"), 0.8)
    with pytest.raises(ValueError, match="cannot be reached"):
        route(made(), 0.2)
    x = torch.randn(2, 3, 48)
    with torch.no_grad(), pytest.raises(ValueError, match="read padding from a tensor.*use attn_implementation"):
        next(iter(route(made(), 0.8).model.layers))(x, attention_mask=object())  # as flex attention's block masks
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask is a object, of which no rows can be taken"):
        _chosen("attention_mask", object(), torch.tensor([0]), 2)
