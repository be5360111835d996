"""The policy as a module: normalisation, crops, cameras, alignment, files, runner."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from policy_parts import SIZE, make_policy
from torch import nn

from xdfast.models.checkpoint import CheckpointError
from xdfast.robot import PolicySpec, build_encoder, load_policy, save_policy
from xdfast.robot.encoder import EncoderSpec
from xdfast.robot.normalize import MinMax
from xdfast.robot.pictures import crop
from xdfast.robot.runner import PolicyRunner, measure_latency

pytestmark = pytest.mark.usefixtures("one_thread")


def _observation(policy, rows=3):
    spec = policy.spec
    images = torch.randint(0, 256, (rows, len(spec.cameras), spec.n_obs, SIZE, SIZE, 3), dtype=torch.uint8)
    return images, torch.randn(rows, spec.n_obs, 9)


def test_min_max_maps_the_range_and_leaves_constants() -> None:
    norm = MinMax(3).fit(torch.tensor([-2.0, 5.0, 0.0]), torch.tensor([2.0, 5.0, 10.0]))
    x = torch.tensor([[-2.0, 5.0, 0.0], [2.0, 5.0, 10.0], [0.0, 5.5, 5.0]])
    y = norm(x)
    torch.testing.assert_close(y, torch.tensor([[-1.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 0.5, 0.0]]))
    torch.testing.assert_close(norm.inverse(y), x)
    with pytest.raises(ValueError, match=r"dimensions \[1\] are not finite"):
        norm.fit(torch.tensor([0.0, float("nan"), 0.0]), torch.ones(3))
    with pytest.raises(ValueError, match="below the smallest"):
        norm.fit(torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
@pytest.mark.parametrize("n_obs", [1, 2])
def test_acting_gives_the_right_part_of_the_horizon_in_the_units_of_the_data(n_obs, scheduler) -> None:
    policy = make_policy(n_obs=n_obs, scheduler=scheduler)
    policy.action_norm.fit(torch.full((4,), 10.0), torch.full((4,), 20.0))
    images, state = _observation(policy)
    noise = policy.noise(3, torch.Generator().manual_seed(1))
    acted = policy.act(images, state, noise=noise)
    chunk = policy.diffusion.sample(policy.condition(policy.features(images), state), noise)
    torch.testing.assert_close(acted, 15 + 5 * chunk[:, n_obs - 1 : n_obs + 7])
    assert acted.shape == (3, 8, 4) and acted.min() >= 10 - 1e-4 and acted.max() <= 20 + 1e-4


def test_several_cameras_shared_or_not() -> None:
    shared = make_policy(cameras=("a", "b"), n_obs=2)
    apart = make_policy(cameras=("a", "b"), n_obs=2, share_encoder=False)
    images, state = _observation(shared, rows=2)
    assert len(shared.encoders) == 1 and len(apart.encoders) == 2
    features = apart.features(images)
    assert features.shape == shared.features(images).shape and features.shape[:3] == (2, 2, 2)
    # each camera's encoder sees its own pictures, in the right order
    middle = crop(images.flatten(0, 1), 20, at_random=False).unflatten(0, (2, 2))
    pixels = middle[:, 1].flatten(0, 1).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(features[:, 1].flatten(0, 1), apart.encoders[1](pixels).features)
    assert apart.act(images, state).shape == (2, 8, 4)


def test_crops_are_random_in_training_alike_over_time_and_in_the_middle_otherwise() -> None:
    rows = torch.arange(SIZE).view(1, 1, SIZE, 1, 1).expand(6, 2, SIZE, SIZE, 3).to(torch.uint8)
    rows = torch.stack([rows[..., 0], rows[..., 0].transpose(2, 3), rows[..., 2]], dim=-1)
    assert (crop(rows, 20, at_random=False)[..., 0, 0, :2] == 2).all()
    tops = crop(rows, 20, at_random=True)[..., 0, 0, :2]  # [N, T, (top, left)]
    assert (tops[:, 0] == tops[:, 1]).all() and len(tops[:, 0].unique(dim=0)) > 1 and tops.max() <= 4


def test_training_mode_draws_and_eval_mode_repeats() -> None:
    policy = make_policy()
    images, _ = _observation(policy)
    assert torch.equal(policy.features(images), policy.features(images))
    policy.train()
    assert not torch.equal(policy.features(images), policy.features(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, s: (i[:, :, :, :20], s), r"expected images \[B, 1, 1, 24, 24, 3\] of cameras dp3, got"),
        (lambda i, s: (i.float(), s), "expected uint8 images"),
        (lambda i, s: (i, s[..., :8]), r"expected state \[B, 1, 9\], got \[3, 1, 8\]"),
        (lambda i, s: (i, s * float("nan")), "not finite"),
    ],
)
def test_bad_observations(change, message) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        policy.act(*change(*_observation(policy)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"horizon": 15}, "horizon must be a multiple of 2 with 2 unet_widths, got 15"),
        ({"n_action": 17}, r"n_action \(17\) \+ n_obs \(1\) - 1 must not exceed horizon \(16\)"),
        ({"crop": 25}, r"crop \(25\) must not exceed the pictures' size \(24, 24\)"),
        ({"n_obs": 0}, "n_obs must be ≥ 1, got 0"),
    ],
)
def test_bad_specs(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**given)


# --- the encoder and its BatchNorm rule


def test_untrained_batch_norm_becomes_group_norm_and_trained_becomes_frozen(tmp_path) -> None:
    from xdfast.models import create_model, save_student

    fresh, spec = build_encoder("resnet18", image_size=32)
    kinds = {type(part).__name__ for part in fresh.modules()}
    assert spec.norm == "group" and "GroupNorm" in kinds and "BatchNorm2d" not in kinds
    norms = [part for part in fresh.modules() if isinstance(part, nn.GroupNorm)]
    assert len(norms) == 20 and all(part.num_channels // part.num_groups == 16 for part in norms)
    student = create_model("resnet10t", num_classes=3, image_size=32).train()
    student(torch.rand(8, 3, 32, 32))  # statistics that are not the initial ones
    save_student(student, tmp_path)
    trained, spec = build_encoder(tmp_path)
    assert spec.norm == "frozen" and trained.num_classes == 0
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(trained.train()(images).features, student.eval()(images).features)


def test_the_rule_has_no_effect_without_batch_norm_and_refuses_nonsense(tmp_path) -> None:
    from xdfast.models import create_model, save_student

    assert build_encoder("test_vit", image_size=32)[1].norm == "none"
    with pytest.raises(
        ValueError, match="norm must be one of auto, frozen, group, batch, got 'groups'. Did you mean 'group'"
    ):
        build_encoder("test_resnet", norm="groups")
    with pytest.raises(ValueError, match="needs statistics, and test_resnet is untrained"):
        build_encoder("test_resnet", norm="frozen")
    save_student(create_model("test_resnet", num_classes=3, image_size=32), tmp_path)
    with pytest.raises(ValueError, match="would throw away what .* learned.*xdistill-imagenet-gn"):
        build_encoder(tmp_path, norm="group")


def test_the_encoder_of_a_policy_can_be_taken_further(tmp_path) -> None:
    policy = make_policy()
    save_policy(policy, tmp_path / "policy")
    encoder, spec = build_encoder(tmp_path)
    assert spec.norm == "group" and spec.source == str(tmp_path)
    images = torch.rand(2, 3, 20, 20)
    assert torch.equal(encoder.eval()(images).features, policy.encoders[0](images).features)
    with pytest.raises(ValueError, match="was trained with norm='group'"):
        build_encoder(tmp_path, norm="frozen")
    with pytest.raises(ValueError, match="pictures of 20 px in its encoder, got 28"):
        build_encoder(tmp_path, image_size=28)
    save_policy(make_policy(cameras=("a", "b"), share_encoder=False), tmp_path / "policy")
    with pytest.raises(ValueError, match="an encoder for each of its cameras"):
        build_encoder(tmp_path)


# --- files


@pytest.mark.parametrize("norm", ["auto", "batch"])
def test_a_saved_policy_acts_the_same(tmp_path, norm) -> None:
    policy = make_policy(norm=norm, cameras=("a", "b"), n_obs=2, share_encoder=False)
    policy.action_norm.fit(torch.zeros(4), torch.full((4,), 3.0))
    again = load_policy(save_policy(policy, tmp_path / "policy").parent)  # also from the run's folder
    images, state = _observation(policy)
    noise = policy.noise(3)
    assert torch.equal(policy.act(images, state, noise=noise), again.act(images, state, noise=noise))
    assert again.spec == policy.spec and not again.training


def test_a_module_of_ones_own_has_to_be_passed_again(tmp_path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    encoder, facts = build_encoder(Tiny(), image_size=20)
    policy = make_policy()
    spec = PolicySpec(4, 9, ("dp3",), (SIZE, SIZE), 20, facts, unet_widths=(16,), diffusion=policy.spec.diffusion)
    save_policy(type(policy)(spec, encoder), tmp_path)
    with pytest.raises(ValueError, match=r"Tiny.*load_policy\(folder, encoder=module\)"):
        load_policy(tmp_path)
    assert load_policy(tmp_path, encoder=Tiny()).spec == spec


def test_damaged_and_missing_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no policy in"):
        load_policy(tmp_path)
    save_policy(make_policy(), tmp_path)
    weights = tmp_path / "policy.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_policy(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="only the spec"):
        load_policy(tmp_path)
    save_policy(make_policy(feature_dim=9), tmp_path / "other")
    (tmp_path / "other" / "policy.safetensors").rename(weights)
    with pytest.raises(CheckpointError, match="does not fit policy.json"):
        load_policy(tmp_path)
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(CheckpointError, match="policy.json is damaged"):
        load_policy(tmp_path)


def test_the_spec_survives_json() -> None:
    spec = make_policy(n_obs=2).spec
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert isinstance(spec.encoder, EncoderSpec)


# --- the runner


def test_rows_do_not_depend_on_what_runs_beside_them() -> None:
    policy = make_policy()
    images, state = _observation(policy, rows=4)
    noise = policy.noise(4)
    runner = PolicyRunner(policy, 4)
    together = runner.act(images.numpy(), state.numpy(), noise)
    alone = np.concatenate([runner.act(images[i : i + 1], state[i : i + 1], noise[:, i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 4 rows, got 5"):
        runner.act(images[[0] * 5], state[[0] * 5], noise[:, [0] * 5])
    with pytest.raises(ValueError, match="not finite"):
        runner.act(images, state * float("inf"), noise)
    with pytest.raises(ValueError, match="captures CUDA work"):
        PolicyRunner(policy, graph=True)


def test_latency_has_parts_and_a_name() -> None:
    latency = measure_latency(make_policy(), runs=3)
    assert 0 < latency.p50 <= latency.p95 and latency.encode > 0 and latency.denoise > 0
    assert latency.how.startswith("eager on cpu, denoiser ") and latency.steps == 4


@pytest.mark.gpu
def test_a_captured_decision_equals_an_eager_one() -> None:
    policy = make_policy(scheduler="ddpm").cuda()
    images, state = _observation(policy)
    noise = policy.noise(3)
    eager = PolicyRunner(policy, 3, device="cuda", graph=False).act(images, state, noise)
    captured = PolicyRunner(policy, 3, device="cuda")
    np.testing.assert_allclose(captured.act(images, state, noise), eager, rtol=1e-4, atol=1e-5)
    assert "CUDA graph" in captured.reason
