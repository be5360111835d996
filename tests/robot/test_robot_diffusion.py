"""Sampling and training targets against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch

from xdfast.robot.diffusion import PREDICTIONS, SCHEDULERS, Diffusion, DiffusionSettings, make_scheduler
from xdfast.robot.unet1d import ConditionalUnet1d

pytestmark = pytest.mark.usefixtures("one_thread")


def _diffusion(*settings) -> Diffusion:
    return Diffusion(ConditionalUnet1d(3, 6, widths=(16, 32)), DiffusionSettings(*settings))


@pytest.mark.parametrize("steps", [1, 10, 16, 100])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sampling_equals_diffusers_step_by_step(scheduler, prediction, steps, monkeypatch) -> None:
    import diffusers.schedulers.scheduling_ddpm as ddpm

    diffusion = _diffusion(scheduler, prediction, 100, steps)
    noise, condition = torch.randn(diffusion.noise_count, 2, 8, 3), torch.randn(2, 6)
    theirs, x = make_scheduler(diffusion.settings), noise[0]
    with torch.no_grad():
        for index, step in enumerate(theirs.timesteps):
            # DDPM draws inside: give it the noise that ours is given
            monkeypatch.setattr(ddpm, "randn_tensor", lambda *_, index=index, **__: noise[index + 1])
            predicted = diffusion.unet(x, torch.full((2,), int(step)), condition)
            x = theirs.step(predicted, step, x).prev_sample
        ours = diffusion.sample(condition, noise)
    # ε-prediction divides by √ᾱ ≈ 0.005 at the first of 100 steps: rounding grows by 200
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=3e-4 if prediction == "epsilon" else 1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_that_of_add_noise(prediction) -> None:
    diffusion = _diffusion("ddim", prediction, 100, 10)
    actions, condition = torch.rand(5, 8, 3) * 2 - 1, torch.randn(5, 6)
    torch.manual_seed(3)
    ours = diffusion.loss(actions, condition, draws=2)
    torch.manual_seed(3)
    twice, conditions = actions.repeat(2, 1, 1), condition.repeat(2, 1)
    noise = torch.randn_like(twice)
    steps = torch.randint(0, 100, (10,))
    noisy = make_scheduler(diffusion.settings).add_noise(twice, noise, steps)
    target = twice if prediction == "sample" else noise
    expected = (diffusion.unet(noisy, steps, conditions) - target).square().mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_condition_and_every_weight() -> None:
    diffusion = _diffusion("ddim", "sample", 100, 10)
    condition = torch.randn(4, 6, requires_grad=True)
    diffusion.loss(torch.rand(4, 8, 3), condition, draws=3).backward()
    assert condition.grad is not None and (condition.grad != 0).all(dim=1).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in diffusion.parameters())


def test_actions_stay_in_range_whatever_the_network_says() -> None:
    diffusion = _diffusion("ddim", "sample", 100, 10)
    with torch.no_grad():
        for parameter in diffusion.unet.last.parameters():
            parameter.mul_(100)
        assert diffusion.sample(torch.randn(3, 6), torch.randn(1, 3, 8, 3)).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("dim", "sample", 100, 10), "scheduler must be one of ddim, ddpm, got 'dim'. Did you mean 'ddim'"),
        (("ddim", "noise", 100, 10), "prediction must be one of sample, epsilon, got 'noise'"),
        (("ddim", "sample", 1, 1), "train_steps must be ≥ 2, got 1"),
        (("ddim", "sample", 10, 11), r"between 1 and train_steps \(10\), got 11"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSettings(*settings).validate()
