"""finetune for several tasks by diffusion: command line and function, settings, a run that was interrupted."""

from __future__ import annotations

import pytest
import torch
from vla_parts import TASKS, write_task

import xdfast
from xdfast.cli import main
from xdfast.pipeline.folder import load_run
from xdfast.robot.diffusion import DiffusionSettings

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = ["drawer-open", "drawer-close"]
SMALL = {
    "crop": 20, "width": 32, "layers": 2, "heads": 2, "horizon": 8, "n_action": 4, "text_length": 8, "batch_size": 8,
    "steps": 6, "warmup_steps": 1, "log_every": 2, "progress": False, "device": "cpu", "objective": "diffusion",
    "denoiser_width": 32, "denoiser_depth": 1, "train_steps": 50, "inference_steps": 5, "noise_draws": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("demos")
    write_task(folder / "drawer-open", TASKS[0], 0.5)
    write_task(folder / "drawer-close", TASKS[1], -0.5)
    return str(folder)


def test_the_command_line_trains_it_and_the_function_finds_it(demos, tmp_path) -> None:
    out = str(tmp_path / "vla")
    options = {key: value for key, value in SMALL.items() if key != "progress"}
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words = ["finetune", "--model", "test_resnet", "--tasks", *BOTH, "--demos", demos, "--out", out, "--no-progress"]
    assert not main([*words, *flags])
    vla = load_run(out).policy
    assert vla.spec.diffusion == DiffusionSettings("ddim", "sample", 50, 5)
    assert (vla.spec.objective, vla.spec.denoiser_width, vla.spec.denoiser_depth) == ("diffusion", 32, 1)
    run = xdfast.finetune("test_resnet", tasks=BOTH, demos=demos, out=out, **SMALL)
    assert run.metrics["steps"] == 6
    with pytest.raises(ValueError, match="inference_steps: 5 there, 6 asked for"):
        xdfast.finetune("test_resnet", tasks=BOTH, demos=demos, out=out, **SMALL | {"inference_steps": 6})


def test_it_learns_what_the_sentence_says_even_under_bfloat16(demos, tmp_path) -> None:
    settings = {**SMALL, "steps": 120, "lr": 3e-3, "ema": None, "amp": "bf16", "noise_draws": 8}
    run = xdfast.finetune("test_resnet", tasks=BOTH, demos=demos, out=str(tmp_path / "vla"), **settings)
    losses = [row["loss"] for row in run.history if row["kind"] == "train"]
    assert losses[-1] < 0.3 * losses[0]
    vla = run.policy
    images, state = torch.zeros(1, 1, 1, 24, 24, 3, dtype=torch.uint8), torch.zeros(1, 1, 9)
    for noise in (None, vla.noise(1, torch.Generator().manual_seed(0))):
        signs = [
            float(vla.instructed(text).act(images, state, noise)[0, 0, 0])
            for text in ("Open the drawer", "Close the drawer")
        ]
        assert signs[0] > 0.2 and signs[1] < -0.2


def test_an_interrupted_run_ends_with_the_same_weights(demos, tmp_path, monkeypatch) -> None:
    """Noise and steps of an update are a function of the seed and its number."""
    from xdfast.pipeline.vla_task import VLATask

    settings = {**SMALL, "checkpoint_seconds": 0.0, "demos": demos}
    whole = xdfast.finetune("test_resnet", tasks=BOTH, out=str(tmp_path / "whole"), **settings)
    forward, calls = VLATask.forward, []

    def failing(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VLATask, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        xdfast.finetune("test_resnet", tasks=BOTH, out=str(tmp_path / "broken"), **settings)
    monkeypatch.setattr(VLATask, "forward", forward)
    again = xdfast.finetune("test_resnet", tasks=BOTH, out=str(tmp_path / "broken"), **settings)
    mine, theirs = again.policy.state_dict(), whole.policy.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "difusion"}, "objective must be one of l1, smooth_l1, diffusion, got 'difusion'"),
        ({"prediction": "noise"}, "prediction must be one of sample, epsilon, got 'noise'"),
        ({"inference_steps": 51}, r"inference_steps must be between 1 and train_steps \(50\), got 51"),
        ({"denoiser_depth": 0}, "denoiser_depth must be"),
        ({"noise_draws": 0}, "noise_draws must be"),
    ],
)
def test_bad_settings_are_told_before_any_training(demos, tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        xdfast.finetune("test_resnet", tasks=BOTH, demos=demos, out=str(tmp_path / "vla"), **SMALL | settings)
