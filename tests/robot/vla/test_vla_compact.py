"""The compact VLA: tokens, interface, encoders, routing, files, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from vla_parts import SIZE, make_vla, observation

import xdfast.nn
from xdfast.models.checkpoint import CheckpointError
from xdfast.nn.branches import AttentionBranch, MLPBranch
from xdfast.robot import build_encoder
from xdfast.robot.vla import Observation, VLASpec, check_teacher, hidden_states, load_vla, save_vla
from xdfast.robot.vla.vision import GridEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tokens_are_pictures_words_state_and_queries_in_this_order() -> None:
    vla = make_vla(cameras=("a", "b"))
    images, state, told = observation(vla, rows=2)
    base = vla.embed(Observation(images, state, told))
    assert base.shape == (2, vla.num_tokens, 32) and vla.num_tokens == 2 * 4 + 8 + 1 + 16
    assert vla.groups == {"vision": (0, 8), "language": (8, 16)}

    def moved(images=images, state=state, told=told) -> list[int]:
        other = vla.embed(Observation(images, state, told))
        return (other != base).any(-1).any(0).nonzero().flatten().tolist()

    assert moved(state=state + 1) == [16]
    assert moved(told=vla.tokenizer.encode_all(["Close the drawer"] * 2, 8)) == [8]
    second = images.clone()
    second[:, 1] = 255 - second[:, 1]
    assert moved(images=second) == [4, 5, 6, 7]


def test_it_is_a_teacher() -> None:
    vla = make_vla()
    check_teacher(vla)
    seen = Observation(*observation(vla))
    tokens = vla.embed(seen)
    states = hidden_states(vla.layers, tokens)
    assert len(states) == vla.num_layers + 1 and states[0] is tokens
    torch.testing.assert_close(states[1], vla.layers[0](tokens))
    torch.testing.assert_close(vla.decode(states[-1]), vla.actions(seen))
    assert vla(seen).shape == (3, vla.chunk, vla.action_dim) and vla.dim == 32
    assert not any(layer._forward_hooks for layer in vla.layers)


def test_what_is_no_teacher_is_told() -> None:
    with pytest.raises(TypeError, match=r"Linear is no teacher VLA: it has no embed, layers, decode, actions, groups"):
        check_teacher(torch.nn.Linear(2, 2))
    vla = make_vla()
    vla.layers = torch.nn.Sequential(*vla.layers[:1])
    with pytest.raises(ValueError, match="a list of 2 modules .* got Sequential of 1"):
        check_teacher(vla)


@pytest.mark.parametrize(
    ("name", "size", "level", "tokens"),
    [("test_resnet", 20, -1, 1), ("test_resnet", 20, -2, 4), ("test_vit", 160, -1, 100), ("test_convnext", 64, -2, 16)],
)
def test_any_timm_model_gives_tokens_and_nothing_is_trained_in_vain(name, size, level, tokens) -> None:
    vla = make_vla(encoder=name, model_size=size, level=level)
    assert vla.encoder.tokens == tokens and vla.groups["vision"] == (0, tokens)
    images, state, told = observation(vla, rows=1)
    vla(Observation(images, state, told)).sum().backward()
    assert [n for n, p in vla.named_parameters() if p.requires_grad and p.grad is None] == []


def test_encoders_without_maps_are_refused() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(3, 5)

        def forward(self, x):
            return self.map(x.mean((2, 3)))

    encoder, _ = build_encoder(Plain(), image_size=20)
    with pytest.raises(ValueError, match="Plain has no feature maps that timm knows"):
        GridEncoder(encoder)
    encoder, _ = build_encoder("test_resnet", image_size=20)
    with pytest.raises(ValueError, match="has 5 feature maps, level=-6"):
        GridEncoder(encoder, -6)
    with pytest.raises(ValueError, match="level counts from the last"):
        GridEncoder(encoder, 0)


def test_acting_gives_the_first_actions_in_the_units_of_the_data() -> None:
    vla = make_vla(n_action=5)
    vla.action_norm.fit(torch.full((4,), 10.0), torch.full((4,), 20.0))
    seen = observation(vla)
    acted = vla.act(*seen)
    torch.testing.assert_close(acted, 15 + 5 * vla.actions(Observation(*seen))[:, :5].detach())
    assert acted.shape == (3, 5, 4) and acted.dtype == torch.float32 and not acted.requires_grad


def test_crops_are_random_in_training_only() -> None:
    vla = make_vla()
    images, _, _ = observation(vla)
    assert torch.equal(vla.features(images), vla.features(images))
    vla.train()
    assert not torch.equal(vla.features(images), vla.features(images))


def _batch(vla, actions):
    images, state, told = observation(vla, len(actions))
    batch = Observation(images, state, told)
    object.__setattr__(batch, "actions", actions)
    return batch


def test_the_loss_is_the_distance_of_normalised_actions() -> None:
    vla = make_vla()
    vla.action_norm.fit(torch.full((4,), -2.0), torch.full((4,), 2.0))
    batch = _batch(vla, torch.randn(3, 16, 4))
    torch.testing.assert_close(vla.loss(batch), (vla.actions(batch) - batch.actions / 2).abs().mean())
    smooth = make_vla(objective="smooth_l1")
    smooth.load_state_dict(vla.state_dict())
    distance = (vla.actions(batch) - batch.actions / 2).abs()
    torch.testing.assert_close(smooth.loss(batch), torch.where(distance < 0.1, 5 * distance**2, distance - 0.05).mean())
    batch.actions[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"actions are not finite \(NaN or infinity\) in samples \[1\]"):
        vla.loss(batch)
    with pytest.raises(ValueError, match=r"expected actions \[3, 16, 4\], got \[3, 8, 4\]"):
        vla.loss(_batch(vla, torch.zeros(3, 8, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, s, t: (i[:, :1], s, t), r"expected images \[B, 2, 1, 24, 24, 3\] of cameras a, b, got \[3, 1, 1"),
        (lambda i, s, t: (i[..., :20, :], s, t), "expected images"),
        (lambda i, s, t: (i.float(), s, t), "expected uint8 images"),
        (lambda i, s, t: (i, s[..., :8], t), r"expected state \[3, 1, 9\], got \[3, 1, 8\]"),
        (lambda i, s, t: (i, s * float("nan"), t), "state is not finite"),
        (lambda i, s, t: (i, s, t[:, :5]), r"expected instruction ids \[3, 8\], got \[3, 5\]; vla.tokenizer"),
        (lambda i, s, t: (i, s, t.int()), "expected instruction ids of int64, got torch.int32"),
        (lambda i, s, t: (i, s, t + 90), r"instruction ids must be 0 to 5 \(the vocabulary\), got 90 to 95"),
    ],
)
def test_bad_observations(change, message) -> None:
    vla = make_vla(cameras=("a", "b"))
    with pytest.raises(ValueError, match=message):
        vla.act(*change(*observation(vla)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 33}, r"width must be a multiple of heads \(2\), got 33"),
        ({"n_action": 17}, r"n_action \(17\) must not exceed horizon \(16\)"),
        ({"crop": 25}, r"crop \(25\) must not exceed the pictures' size \(24, 24\)"),
        ({"layers": 0}, "layers must be ≥ 1, got 0"),
        ({"cameras": ()}, "a VLA needs a camera"),
        ({"objective": "l2"}, "objective must be one of l1, smooth_l1, diffusion, got 'l2'. Did you mean 'l1'"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be > 0"),
    ],
)
def test_bad_specs(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_vla(**given)


# --- files


def test_files_rebuild_it(tmp_path) -> None:
    vla = make_vla(tasks=("drawer-open",), fps=80)
    vla.action_norm.fit(torch.zeros(4), torch.full((4,), 3.0))
    folder = save_vla(vla, tmp_path / "run" / "vla", extra={"metrics": {"loss": 0.5}})
    again = load_vla(tmp_path / "run")
    assert again.spec == vla.spec and not again.training and VLASpec.from_dict(vla.spec.to_dict()) == vla.spec
    seen = observation(vla)
    assert torch.equal(again.act(*seen), vla.act(*seen))
    assert json.loads((folder / "vla.json").read_text())["metrics"] == {"loss": 0.5}
    assert sorted(p.name for p in folder.iterdir()) == ["vla.json", "vla.safetensors"]


def test_a_module_of_yours_as_encoder_is_passed_again(tmp_path) -> None:
    module = build_encoder("test_resnet", image_size=20)[0].net
    module.pretrained_cfg = {}
    vla = make_vla(encoder=module)
    save_vla(vla, tmp_path)
    with pytest.raises(ValueError, match=r"was a module of yours .*load_vla\(folder, encoder=module\)"):
        load_vla(tmp_path)
    seen = observation(vla)
    fresh = build_encoder("test_resnet", image_size=20)[0].net
    fresh.pretrained_cfg = {}
    assert torch.equal(load_vla(tmp_path, encoder=fresh).act(*seen), vla.act(*seen))


def test_damaged_and_missing_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no VLA in .* \(no vla.json\)"):
        load_vla(tmp_path)
    folder = save_vla(make_vla(), tmp_path / "vla")
    weights, spec = folder / "vla.safetensors", folder / "vla.json"
    data, text = weights.read_bytes(), spec.read_text()
    weights.write_bytes(data[:500])
    with pytest.raises(CheckpointError, match="vla.safetensors is damaged"):
        load_vla(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds only the spec of a VLA"):
        load_vla(folder)
    weights.write_bytes(data)
    spec.write_text(text.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(CheckpointError, match=r"does not fit vla.json: Missing key\(s\)"):
        load_vla(folder)
    spec.write_text(text[:40])
    with pytest.raises(CheckpointError, match="vla.json is damaged"):
        load_vla(folder)


# --- routing


def _routed(vla, **options):
    groups = list(vla.groups.values())
    return xdfast.nn.route(
        vla, 0.5, blocks="layers", tokens=vla.num_tokens, router={"groups": groups}, always_on=(0,), **options
    )


def test_layers_are_routed_as_attention_and_mlp_and_compute_the_same() -> None:
    vla = make_vla(layers=4)
    student = _routed(vla)
    assert [type(b) for b in student.layers.branches_of(1)] == [AttentionBranch, MLPBranch]
    check_teacher(student)
    seen = observation(vla)
    with torch.no_grad(), xdfast.nn.fixed_gates(student, torch.ones(3, 4)):
        torch.testing.assert_close(student.act(*seen), vla.act(*seen), rtol=1e-4, atol=1e-5)
        assert student.layers.decision.executor == "cpu"


def test_a_skipped_layer_is_the_identity_and_its_state_can_still_be_tapped() -> None:
    vla = make_vla(layers=4)
    student = _routed(vla)
    tokens = vla.embed(Observation(*observation(vla))).detach()
    gates = torch.tensor([[1.0, 0, 1, 1]]).repeat(3, 1)
    with torch.no_grad(), xdfast.nn.fixed_gates(student, gates):
        states = hidden_states(student.layers, tokens)
        dense = vla.layers[3](vla.layers[2](vla.layers[0](tokens)))
    assert len(states) == 5 and torch.equal(states[1], states[2])
    torch.testing.assert_close(states[-1], dense, rtol=1e-4, atol=1e-5)


def test_pictures_of_another_size_than_the_crop_are_resized_by_the_encoder() -> None:
    vla = make_vla(crop=SIZE, model_size=32)
    assert vla.act(*observation(vla)).shape == (3, 8, 4)
