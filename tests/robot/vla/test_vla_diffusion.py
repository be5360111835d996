"""A VLA that learns by diffusion: its denoiser, its loss, chunks that are a function of the noise, files, the closed loop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sim_process import needs_renderer
from torch.nn import functional as F
from vla_parts import make_vla, observation

import xdfast
from xdfast.robot import Controller
from xdfast.robot.diffusion import DiffusionSettings, make_scheduler
from xdfast.robot.rollout import rollout
from xdfast.robot.runner import PolicyRunner, measure_latency
from xdfast.robot.vla import Observation, VLASpec, check_teacher, load_vla, save_vla
from xdfast.robot.vla.denoiser import ChunkDenoiser, DiffusionHead

pytestmark = pytest.mark.usefixtures("one_thread")

PREDICTIONS = ("sample", "epsilon")


def _vla(prediction="sample", scheduler="ddim", **spec):
    settings = DiffusionSettings(scheduler, prediction, 50, 5)
    sizes = {"horizon": 8, "n_action": 4, "denoiser_width": 32, "denoiser_depth": 2}
    return make_vla(objective="diffusion", diffusion=settings, **(sizes | spec))


def _batch(vla, actions):
    batch = Observation(*observation(vla, len(actions)))
    object.__setattr__(batch, "actions", actions)
    return batch


# --- the denoiser


def test_the_denoiser_sees_every_action_its_condition_and_the_step() -> None:
    denoiser = ChunkDenoiser(3, 5, 6, width=16, depth=2)
    actions, condition = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 6, requires_grad=True)
    out = denoiser(actions, torch.tensor([3, 40]), condition)
    assert out.shape == (2, 5, 3)
    out[0, 1].sum().backward()
    assert (actions.grad[0] != 0).all() and (
        condition.grad[0] != 0
    ).all()  # actions of a chunk are mixed, samples are not
    assert (actions.grad[1] == 0).all() and (condition.grad[1] == 0).all()
    assert not torch.allclose(out, denoiser(actions, torch.tensor([3, 4]), condition))
    torch.testing.assert_close(out[:1], denoiser(actions[:1], torch.tensor([3]), condition[:1]))


def test_gradients_reach_every_weight() -> None:
    vla = _vla()
    tokens = torch.randn(4, vla.num_tokens, vla.dim, requires_grad=True)
    vla.chunk_loss(tokens, torch.rand(4, 8, 4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*vla.head.parameters(), *vla.norm.parameters()))
    assert (tokens.grad[:, -8:] != 0).any(-1).all() and (tokens.grad[:, :-8] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 0}, r"sizes of a denoiser must be ≥ 1, got .* width=0"),
        ({"depth": 0}, r"depth=0"),
        ({"time_dim": 7}, "time_dim must be even, got 7"),
    ],
)
def test_bad_denoisers(sizes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkDenoiser(3, 5, 6, **sizes)


# --- learning


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_diffusers_add_noise(prediction) -> None:
    vla = _vla(prediction)
    vla.action_norm.fit(torch.full((4,), -2.0), torch.full((4,), 2.0))
    tokens, actions = torch.randn(3, vla.num_tokens, vla.dim), torch.rand(3, 8, 4) * 4 - 2
    torch.manual_seed(3)
    ours = vla.chunk_loss(tokens, actions, draws=2)
    torch.manual_seed(3)
    twice, asked = (actions / 2).repeat(2, 1, 1), vla.norm(tokens[:, -8:]).repeat(2, 1, 1)
    noise, steps = torch.randn_like(twice), torch.randint(0, 50, (6,))
    noisy = make_scheduler(vla.spec.diffusion).add_noise(twice, noise, steps)
    wanted = F.mse_loss(vla.head.unet(noisy, steps, asked), twice if prediction == "sample" else noise)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_batch_is_that_of_its_tokens() -> None:
    for vla in (_vla(), make_vla(horizon=8)):
        batch = _batch(vla, torch.rand(3, 8, 4))
        torch.manual_seed(1)
        whole = vla.loss(batch)
        torch.manual_seed(1)
        assert torch.equal(vla.chunk_loss(vla.layers(vla.embed(batch)), batch.actions), whole)


def test_autocast_on_a_cpu_leaves_the_denoiser_alone() -> None:
    vla = _vla()
    tokens, actions, noise = torch.randn(3, vla.num_tokens, vla.dim), torch.rand(3, 8, 4), vla.noise(3)

    def both():
        torch.manual_seed(1)
        with torch.no_grad():
            return vla.chunk_loss(tokens, actions), vla.decode(tokens, noise)

    plain = both()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(both(), plain, rtol=1e-6, atol=1e-6)


def test_bad_actions_are_told() -> None:
    vla = _vla()
    actions = torch.zeros(3, 8, 4)
    actions[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"actions are not finite \(NaN or infinity\) in samples \[1\]"):
        vla.loss(_batch(vla, actions))
    with pytest.raises(ValueError, match=r"expected actions \[3, 8, 4\], got \[3, 7, 4\]"):
        vla.chunk_loss(torch.zeros(3, vla.num_tokens, vla.dim), torch.zeros(3, 7, 4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_learns_chunks_and_gives_them_back(prediction) -> None:
    vla = _vla(prediction)
    tokens = torch.randn(4, vla.num_tokens, vla.dim)
    actions = (torch.randn(4, 1, 4) + 0.3 * torch.randn(4, 8, 4)).clamp(-0.9, 0.9)
    optimizer = torch.optim.Adam(vla.head.parameters(), 5e-3)
    losses = []
    for _ in range(60 if prediction == "sample" else 250):
        loss = vla.chunk_loss(tokens, actions, draws=16)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < losses[0] / 5
    with torch.no_grad():
        for seed in range(3):
            noise = vla.noise(4, torch.Generator().manual_seed(seed))
            assert vla.action_loss(vla.decode(tokens, noise), actions) < 0.1
        if prediction == "sample":
            assert vla.action_loss(vla.decode(tokens), actions) < 0.1


def test_of_two_ways_every_chunk_takes_one() -> None:
    vla = _vla(denoiser_width=64)
    way = torch.linspace(0.2, 0.9, 8)[:, None].expand(8, 4)
    tokens = torch.randn(1, vla.num_tokens, vla.dim).expand(32, -1, -1)
    actions = torch.stack([way, -way] * 16)
    optimizer = torch.optim.Adam(vla.head.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        vla.chunk_loss(tokens, actions, draws=4).backward()
        optimizer.step()
    with torch.no_grad():
        chunks = vla.decode(tokens, vla.noise(32))
    sides = chunks.mean((1, 2)).sign()
    assert {-1.0, 1.0} == set(sides.tolist())
    assert (chunks - sides[:, None, None] * way).abs().mean(dim=(1, 2)).median() < 0.15  # whole chunks go one way


# --- acting


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_chunk_is_a_function_of_the_noise(scheduler) -> None:
    vla = _vla(scheduler=scheduler)
    seen = observation(vla)
    noise = vla.noise(3, torch.Generator().manual_seed(5))
    assert noise.shape == (1 if scheduler == "ddim" else 6, 3, 8, 4)
    assert torch.equal(noise, vla.noise(3, torch.Generator().manual_seed(5)))
    acted = vla.act(*seen, noise)
    assert torch.equal(acted, vla.act(*seen, noise)) and acted.shape == (3, 4, 4) and acted.dtype == torch.float32
    assert not torch.equal(acted, vla.act(*seen, vla.noise(3, torch.Generator().manual_seed(6))))
    state = torch.get_rng_state()
    still = vla.act(*seen)  # without noise from its centre: nothing is drawn
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(still, vla.act(*seen, torch.zeros_like(noise)))
    assert vla.actions(Observation(*seen), noise).abs().max() <= 1
    # a row does not depend on those beside it
    torch.testing.assert_close(vla.act(*(x[1:2] for x in seen), noise[:, 1:2]), acted[1:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"expected noise \[\d, 3, 8, 4\], got \[\d, 2, 8, 4\]; vla.noise\(3\) makes it"
    ):
        vla.act(*seen, noise[:, :2])
    assert make_vla().noise(3).shape == (0, 3)


def test_runner_and_controller_pass_the_noise_on() -> None:
    told = _vla().instructed("Open the drawer")
    images, state, ids = observation(told.vla)
    noise = told.noise(3, torch.Generator().manual_seed(1))
    wanted = told.vla.act(images, state, ids, noise)
    torch.testing.assert_close(told.act(images, state, noise), wanted)
    runner = PolicyRunner(told, 4)  # one row more than there are
    np.testing.assert_allclose(runner.act(images, state, noise), wanted, rtol=1e-4, atol=1e-5)
    seen = {"dp3": images[0, 0, 0].numpy()}, state[0, 0].numpy()
    acted = {seed: [Controller(told, seed=seed).act(*seen) for _ in range(2)] for seed in (0, 1)}
    np.testing.assert_array_equal(acted[0][0], acted[0][1])
    assert np.abs(acted[0][0] - acted[1][0]).max() > 0
    assert measure_latency(told, runs=2).steps == 5


def test_what_follows_the_encoder_compiles_whole() -> None:
    told = _vla().instructed("Open the drawer")
    images, state, _ = observation(told.vla)
    noise = told.noise(3)
    with torch.no_grad():
        compiled = torch.compile(told.core, fullgraph=True, backend="aot_eager")
        decided = told.decide(images, state, noise, compiled)
    torch.testing.assert_close(decided, told.act(images, state, noise), rtol=1e-4, atol=1e-5)


def test_layers_are_routed_and_the_head_stays() -> None:
    vla = _vla(layers=4)
    groups = list(vla.groups.values())
    student = xdfast.nn.route(
        vla, 0.5, blocks="layers", tokens=vla.num_tokens, router={"groups": groups}, always_on=(0,)
    )
    check_teacher(student)
    seen, noise = observation(vla), vla.noise(3)
    with torch.no_grad(), xdfast.nn.fixed_gates(student, torch.ones(3, 4)):
        torch.testing.assert_close(student.act(*seen, noise), vla.act(*seen, noise), rtol=1e-4, atol=1e-5)
    student.train()
    student.loss(_batch(vla, torch.rand(3, 8, 4))).backward()
    assert student.head.unet.leave.weight.grad.abs().sum() > 0


@needs_renderer
def test_an_episode_is_a_function_of_its_seed() -> None:
    vla = _vla(sentences=("Pull the drawer open",), layers=1)
    alone = rollout(vla, "drawer-open", [4], max_steps=8)[0]
    beside = rollout(vla, "drawer-open", [3, 4], envs=2, max_steps=8)[1]
    assert alone.seed == beside.seed == 4 and alone.actions.shape == (8, 4)
    np.testing.assert_allclose(beside.actions, alone.actions, atol=1e-4)


# --- spec and files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "difusion"}, "Did you mean 'diffusion'"),
        (
            {"diffusion": DiffusionSettings()},
            "diffusion settings belong to objective='diffusion'; leave them out with 'l1'",
        ),
        (
            {"objective": "diffusion", "diffusion": DiffusionSettings("ddim", "noise")},
            "prediction must be one of sample",
        ),
        (
            {"objective": "diffusion", "diffusion": DiffusionSettings("ddim", "sample", 10, 11)},
            "inference_steps must be",
        ),
        ({"objective": "diffusion", "denoiser_width": 0}, "denoiser_width must be ≥ 1, got 0"),
        ({"objective": "diffusion", "denoiser_depth": 0}, "denoiser_depth must be ≥ 1, got 0"),
    ],
)
def test_bad_specs(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_vla(**given)


def test_files_rebuild_it(tmp_path) -> None:
    vla = _vla("epsilon", "ddpm")
    save_vla(vla, tmp_path / "vla")
    again = load_vla(tmp_path)
    assert again.spec == vla.spec and again.spec.diffusion == DiffusionSettings("ddpm", "epsilon", 50, 5)
    assert isinstance(again.head, DiffusionHead)
    seen, noise = observation(vla), vla.noise(3)
    assert torch.equal(again.act(*seen, noise), vla.act(*seen, noise))


def test_files_from_before_there_was_diffusion(tmp_path) -> None:
    vla = make_vla()
    folder = save_vla(vla, tmp_path / "vla")
    values = json.loads((folder / "vla.json").read_text())
    for key in ("diffusion", "denoiser_width", "denoiser_depth"):
        del values["spec"][key]
    (folder / "vla.json").write_text(json.dumps(values))
    again, seen = load_vla(tmp_path), observation(vla)
    assert again.spec == vla.spec and again.spec.diffusion is None and torch.equal(again.act(*seen), vla.act(*seen))


def test_settings_are_the_usual_ones_where_none_are_given() -> None:
    spec = make_vla(objective="diffusion").spec
    assert spec.diffusion == DiffusionSettings("ddim", "sample", 100, 10) and VLASpec.from_dict(spec.to_dict()) == spec
