"""Routed models on disk: the same outputs after loading, and what damaged or foreign folders are told."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from xdfast.models import CheckpointError, budget_loss, create_model, load_routed, save_routed
from xdfast.nn import calibrate_flops, route, routed_stacks, whole_block

pytestmark = pytest.mark.usefixtures("one_thread")


def own() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=7)


def undecided(student: nn.Module) -> nn.Module:
    """The student, with a router that leaves some layers off."""
    with torch.no_grad():
        routed_stacks(student)[0].router.head.bias[1::2] = -1
    return student.eval()


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        expected, found = a(x), b(x)
    decisions = [routed_stacks(model)[0].decision.gates for model in (a, b)]
    return torch.equal(expected, found) and torch.equal(*decisions) and not bool(decisions[0].all())


def test_a_timm_model_comes_back_without_being_told(tmp_path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64)
    student = undecided(
        route(model, 0.6, branches=2, gate="gumbel_st", router={"hidden": 16, "groups": [(0, 1), (1, None)]})
    )
    stack = routed_stacks(student)[0]
    logits = torch.randn(16, 12, 2)
    thresholds = calibrate_flops(logits.sigmoid(), stack.costs(17), 0.6, (0, -1), scope="branch").threshold
    stack.gate.set(threshold=thresholds)
    found = load_routed(save_routed(student, tmp_path / "new" / "folder"))
    assert same(student, found, torch.randn(4, 3, 64, 64))
    assert found.xdfast_route == student.xdfast_route and not found.training


def test_options_that_create_model_remembers(tmp_path) -> None:
    net = create_model("vit_tiny_patch16_224", num_classes=5, image_size=32, options={"depth": 3, "patch_size": 8}).net
    student = undecided(route(net, 0.9))
    assert same(student, load_routed(save_routed(student, tmp_path)), torch.randn(2, 3, 32, 32))


def test_an_own_model_needs_its_base(tmp_path) -> None:
    student = undecided(route(own(), 0.6))
    save_routed(student, tmp_path)
    with pytest.raises(
        CheckpointError, match="weights of a timm.*VisionTransformer, which nobody but you can build; pass base="
    ):
        load_routed(tmp_path)
    base = own()
    assert same(student, load_routed(tmp_path, base), torch.randn(2, 3, 32, 32))
    assert not routed_stacks(base)
    described = undecided(route(own(), 0.6, blocks="blocks", describe=whole_block))
    save_routed(described, tmp_path)
    with pytest.raises(CheckpointError, match="describe=, which is code"):
        load_routed(tmp_path, base)
    likewise = route(own(), 0.6, blocks="blocks", describe=whole_block)
    assert same(described, load_routed(tmp_path, likewise), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_decoder_comes_back(tmp_path, name) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    student, ids = undecided(route(model, 0.9)), torch.randint(0, 97, (3, 7))
    found = load_routed(save_routed(student, tmp_path))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, student(ids).logits)
        tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (student, found)]
    assert torch.equal(*tokens)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert load_routed(save_routed(student.to(torch.bfloat16), tmp_path)).dtype == torch.bfloat16


def test_damaged_and_foreign_folders(tmp_path) -> None:
    student = route(own(), 0.6)
    folder = save_routed(student, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no route.json; expected a folder that save_routed wrote"):
        load_routed(tmp_path)
    with pytest.raises(ValueError, match="VisionTransformer is not routed"):
        save_routed(own(), folder)
    weights = load_file(folder / "model.safetensors")

    def changed(**changes: torch.Tensor | None) -> None:
        kept = {name: value for name, value in {**weights, **changes}.items() if value is not None}
        save_file(kept, folder / "model.safetensors")

    changed(**{"blocks.router.head.bias": None})
    with pytest.raises(CheckpointError, match="1 missing .blocks.router.head.bias"):
        load_routed(folder, own())
    changed(**{"blocks.1.mlp.fc1.weight": torch.zeros(3, 48)})
    with pytest.raises(CheckpointError, match="1 of another shape .blocks.1.mlp.fc1.weight"):
        load_routed(folder, own())
    changed(other=torch.zeros(1))
    with pytest.raises(CheckpointError, match="1 not known to it .other"):
        load_routed(folder, own())
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_routed(folder, own())
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        load_routed(folder, own())
    file = folder / "route.json"
    facts = json.loads(file.read_text())
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**facts, "format": 2}), "has format 2, this version of xdfast reads 1"),
        (json.dumps({"format": 1}), "base, described, route missing"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_routed(folder, own())
    save_routed(student, folder)
    unknown = {**facts, "base": {"kind": "timm", "architecture": "vit_none", "num_classes": 1, "options": {}}}
    file.write_text(json.dumps(unknown))
    with pytest.raises(CheckpointError, match="cannot be built .*vit_none.*pass base="):
        load_routed(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        save_routed(student, tmp_path / "file")


def test_budget_loss_trains_a_model_down_to_its_target() -> None:
    student = route(own(), 0.6, router={"hidden": 16})
    stack, criterion = routed_stacks(student)[0], budget_loss(student, return_components=True)
    optimizer = torch.optim.Adam(stack.router.parameters(), lr=0.05)
    x = torch.randn(16, 3, 32, 32)
    first = None
    for _ in range(40):
        student(x)
        components = criterion(stack.decision.gates)
        first = components.fraction if first is None else first
        optimizer.zero_grad()
        components.loss.backward()
        optimizer.step()
    assert first > 0.95 and abs(components.fraction - 0.6) < 0.15
    with pytest.raises(ValueError, match="is not routed"):
        budget_loss(own())
