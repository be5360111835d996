"""Policies through the verbs: training, continuing, frozen encoders, bad input; no simulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from policy_parts import SIZE, write_demos
from safetensors.torch import load_file

import xdfast
from xdfast.pipeline.finetune_policy import build_policy, finetune_policy
from xdfast.pipeline.policy_task import PolicyTask
from xdfast.robot.demos.open import open_demos
from xdfast.robot.windows import Windows

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "task": "my-robot", "image_size": None, "crop": 20, "feature_dim": 8, "unet_widths": (16, 32), "train_steps": 20,
    "inference_steps": 4, "noise_draws": 2, "batch_size": 8, "steps": 24, "warmup_steps": 4, "log_every": 4, "progress": False,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def demos(tmp_path):
    return write_demos(tmp_path / "demos")


def test_training_fits_the_demonstrations_and_leaves_a_policy(demos, tmp_path) -> None:
    settings = {**SMALL, "steps": 150, "lr": 3e-3}
    run = xdfast.finetune("test_resnet", demos=demos, out=str(tmp_path / "run"), **settings)
    losses = [row["loss"] for row in run.history if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert run.kind == "policy" and run.metrics["steps"] == 150 and run.metrics["demos"] == 3
    policy = run.policy
    assert policy.spec.task == "my-robot" and policy.spec.cameras == ("dp3",) and policy.spec.image_size == (SIZE, SIZE)
    # the actions of the demonstrations are half of the first four numbers of the state
    episode = open_demos(demos).episode(0)
    images = torch.from_numpy(np.array(episode.images["dp3"]))[:, None, None]
    state = torch.from_numpy(np.array(episode.state))[:, None]
    acted = policy.act(images, state, generator=torch.Generator().manual_seed(0))[:, 0]
    error = (acted - torch.from_numpy(np.array(episode.actions))).abs().mean()
    assert error < 0.6 * np.abs(episode.actions - episode.actions.mean(0)).mean()
    with pytest.raises(AttributeError, match=r"run of a policy: it has a \.policy"):
        _ = run.student
    again = xdfast.finetune("test_resnet", demos=demos, out=str(tmp_path / "run"), **settings)
    assert again.metrics == run.metrics
    with pytest.raises(ValueError, match="steps: 150 there, 151 asked for"):
        xdfast.finetune("test_resnet", demos=demos, out=str(tmp_path / "run"), **{**settings, "steps": 151})


def test_killed_and_continued_equals_unbroken(demos, tmp_path) -> None:
    code = "import json, sys, xdfast; s = json.loads(sys.argv[1]); xdfast.finetune(**s)"
    shared = {**SMALL, "model": "test_resnet", "demos": str(demos), "checkpoint_seconds": 0.0, "n_obs": 2}
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

    def start(out):
        settings = json.dumps({**shared, "out": str(out)})
        return subprocess.Popen([sys.executable, "-c", code, settings], env=env, stderr=subprocess.PIPE, text=True)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken, killed = start(whole), start(broken)
    while killed.poll() is None and not (broken / "resume.pt").is_file():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (broken / "summary.json").is_file()
    for process in (unbroken, start(broken)):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    a, b = (load_file(path / "policy" / "policy.safetensors") for path in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_frozen_encoder_keeps_its_weights_and_its_features_are_those_of_the_pictures(demos, tmp_path) -> None:
    from xdfast.models import create_model, save_student

    folder = save_student(create_model("test_resnet", num_classes=2, image_size=20), tmp_path / "encoder")
    run = xdfast.finetune(folder, demos=demos, out=str(tmp_path / "run"), encoder="frozen", feature_crops=3, **SMALL)
    before, after = load_file(folder / "model.safetensors"), run.policy.encoders[0].net.state_dict()
    shared = before.keys() & after.keys()
    assert len(shared) > 20 and all(torch.equal(before[key], after[key]) for key in shared)
    joint = xdfast.finetune(folder, demos=demos, out=str(tmp_path / "joint"), **SMALL)
    moved = joint.policy.encoders[0].net.state_dict()
    assert any(not torch.equal(before[key], moved[key]) for key in shared)
    # the first of the fixed crops is the middle, which is what acting sees
    from xdfast.pipeline.finetune_policy import crop_features

    config = xdfast.PolicyConfig.from_dict({**run.config, "feature_crops": 2})
    windows = Windows(open_demos(demos), ("dp3",), n_obs=1, horizon=16)
    features = crop_features(run.policy, windows, config, torch.device("cpu"))
    expected = run.policy.eval().features(windows.images[:, :, None])
    torch.testing.assert_close(features[0], expected[:, :, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features[0], features[1])


def test_the_encoder_has_its_own_rate(demos, tmp_path) -> None:
    config = xdfast.PolicyConfig(**{**SMALL, "demos": str(demos), "out": str(tmp_path), "lr": 1e-3, "encoder_lr": 1e-5})
    config.model = "test_resnet"
    opened = open_demos(demos)
    policy = build_policy(config, Windows(opened, ("dp3",), n_obs=1, horizon=16), ("dp3",), opened)
    rest, encoder = PolicyTask(policy, 2).parameter_groups(config)
    assert (rest["lr"], encoder["lr"]) == (1e-3, 1e-5)
    assert len(rest["params"]) + len(encoder["params"]) == len(list(policy.parameters()))
    frozen = PolicyTask(policy, 2, frozen=True)
    assert [group["lr"] for group in frozen.parameter_groups(config)] == [1e-3]
    assert not frozen.train().student.encoders.training and frozen.student.diffusion.training


def test_every_rank_starts_with_the_same_policy(demos, tmp_path) -> None:
    config = xdfast.PolicyConfig(**{**SMALL, "model": "test_resnet", "demos": str(demos), "out": str(tmp_path)})
    opened = open_demos(demos)
    windows = Windows(opened, ("dp3",), n_obs=1, horizon=16)
    a, b = (build_policy(config, windows, ("dp3",), opened).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "metaworld/drawr-open"}, "unknown task .*Did you mean 'metaworld/drawer-open"),
        ({"task": "drawr-open", "demos": "3"}, "unknown task 'drawr-open'.*Did you mean 'drawer-open'"),
        ({"task": "metaworld/door-open-v3"}, "of metaworld/drawer-open-v3, not of metaworld/door-open-v3"),
        (
            {"task": "drawr-open"},
            "unknown task 'drawr-open'; .* of metaworld/drawer-open-v3: task='metaworld/drawer-open-v3'",
        ),
        ({"task": "adroit/door", "demos": "3"}, "expert"),
        ({"demos": "/nowhere"}, "no demonstrations at /nowhere"),
        ({"demo_limit": 9}, "3"),
        ({"cameras": ("wrist",)}, "wrist.*dp3"),
        ({"evaluate_every": 7}, r"evaluate_every \(7\) must divide steps \(24\)"),
        ({"warmup_steps": 24}, r"warmup_steps \(24\) must be below steps"),
        ({"crop": 25}, r"crop \(25\) must not exceed"),
        ({"horizon": 9}, "horizon must be a multiple of 2"),
        ({"norm": "batch"}, "does not go with the moving average"),
        ({"encoder": "frosen"}, "encoder must be one of joint, frozen, got 'frosen'. Did you mean 'frozen'"),
        ({"encoder": "frozen", "encoder_lr": 1e-4}, "encoder_lr has no meaning"),
        ({"prediction": "noise"}, "prediction must be one of sample, epsilon"),
        ({"data": "x"}, "a policy learns from demos="),
        ({"stepz": 3}, "no setting 'stepz'. Did you mean 'steps'"),
        ({"demos": "0"}, "demos must be a number ≥ 1 or a path"),
        ({"demo_noise": -0.1}, "demo_noise must be from 0 to 1, got -0.1"),
    ],
)
def test_bad_settings_are_told_before_any_training(demos, tmp_path, settings, message) -> None:
    given = {**SMALL, "demos": demos, "out": str(tmp_path / "run"), **settings}
    with pytest.raises(ValueError, match=message):
        xdfast.finetune("test_resnet", **given)
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_a_run_that_failed_before_any_training_does_not_block_its_folder(demos, tmp_path) -> None:
    from xdfast.models import create_model, save_student

    given = {**SMALL, "demos": demos, "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="unknown model"):
        xdfast.finetune(str(tmp_path / "encoder"), **given)
    save_student(create_model("test_resnet", num_classes=2, image_size=20), tmp_path / "encoder")
    assert xdfast.finetune(str(tmp_path / "encoder"), **{**given, "steps": 8}).metrics["steps"] == 8


def test_a_nan_that_gets_into_the_weights_stops_the_run(demos, tmp_path) -> None:
    settings = {**SMALL, "lr": 1e6, "clip_grad": None, "warmup_steps": 0, "schedule": "constant", "log_every": 1}
    with pytest.raises(RuntimeError, match="not finite"):
        xdfast.finetune("test_resnet", demos=demos, out=str(tmp_path / "run"), **settings)


def test_a_policy_of_a_real_robot_cannot_be_simulated(demos, tmp_path, caplog) -> None:
    config = xdfast.PolicyConfig(**{**SMALL, "model": "test_resnet", "demos": str(demos), "out": str(tmp_path / "run")})
    with caplog.at_level("WARNING", logger="xdfast"):
        run = finetune_policy(config)
    assert "task 'my-robot' is none of those simulated here: nothing is evaluated." in caplog.text
    with pytest.raises(ValueError, match="unknown task 'my-robot'"):
        xdfast.evaluate(run)
    with pytest.raises(ValueError, match="no meaning for a policy"):
        xdfast.evaluate(run, data="sklearn:digits")
