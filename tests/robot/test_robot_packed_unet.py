"""The denoiser in fused layers against its modules in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from policy_parts import make_policy
from tolerances import TOLERANCES, relative

from xdfast.ops.conv_rows import conv_rows_available
from xdfast.robot import packed_unet
from xdfast.robot.packed_unet import PackedUnet, packed_sampling
from xdfast.robot.runner import PolicyRunner, example
from xdfast.robot.unet1d import ConditionalUnet1d

needs_extension = pytest.mark.skipif(not conv_rows_available()[0], reason=conv_rows_available()[1])
CPU = torch.device("cpu")


@needs_extension
@pytest.mark.parametrize("widths", [(16,), (16, 32), (24, 40, 64)])
@pytest.mark.parametrize(("batch", "kernel"), [(1, 5), (3, 3)])
@torch.no_grad()
def test_denoises_like_the_modules(widths, batch, kernel) -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1d(5, 11, widths=widths, kernel_size=kernel).eval()
    for parameter in unet.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    actions, steps, condition = torch.randn(batch, 8, 5), torch.randint(0, 100, (batch,)), torch.randn(batch, 11)
    packed = PackedUnet(unet)
    ours = packed.denoise(actions, packed.condition_part(condition) + packed.time_part(steps))
    exact = copy.deepcopy(unet).double()
    theirs = exact.denoise(actions.double(), (unet.condition_part(condition) + unet.time_part(steps)).double())
    assert relative(ours, theirs) < TOLERANCES["packed unet", torch.float32]


@needs_extension
@torch.no_grad()
def test_weights_that_change_are_packed_again() -> None:
    policy = make_policy()
    runner = PolicyRunner(policy, 1)
    images, state, noise = example(policy, 1)
    before = runner.act(images, state, noise)
    for parameter in policy.diffusion.parameters():
        parameter.mul_(1.5)
    changed = runner.act(images, state, noise)
    by_modules = PolicyRunner(policy, 1, packed=False).act(images, state, noise)
    assert abs(changed - before).max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(changed), torch.from_numpy(by_modules), rtol=1e-4, atol=1e-5)


@needs_extension
@torch.no_grad()
def test_writes_past_the_versions_are_seen() -> None:
    """A moving average writes through ``.data``; in a runner convolutions are channels last."""
    policy = make_policy()
    runner = PolicyRunner(policy, 1)
    images, state, noise = example(policy, 1)
    before = runner.act(images, state, noise)
    for parameter in policy.diffusion.unet.down.parameters():
        parameter.data.mul_(1.5)
    assert abs(runner.act(images, state, noise) - before).max() > 1e-4


@needs_extension
@torch.no_grad()
def test_under_autocast_and_of_nobody() -> None:
    unet = ConditionalUnet1d(5, 11, widths=(16, 32)).eval()
    packed, condition = PackedUnet(unet), torch.randn(2, 11)
    film = packed.condition_part(condition)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.denoise(torch.randn(2, 8, 5), film.bfloat16()).shape == (2, 8, 5)
    assert packed.denoise(torch.zeros(0, 8, 5), film[:0]).shape == (0, 8, 5)


@needs_extension
@pytest.mark.parametrize("batch", [1, 4])
def test_a_runner_uses_it_and_says_so(batch) -> None:
    policy = make_policy()
    images, state, noise = example(policy, batch)
    ours, plain = PolicyRunner(policy, batch), PolicyRunner(policy, batch, packed=False)
    assert ours.reason == "eager on cpu, denoiser in fused layers (xdfast._C)" and plain.reason == "eager on cpu"
    torch.testing.assert_close(
        torch.from_numpy(ours.act(images, state, noise)),
        torch.from_numpy(plain.act(images, state, noise)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_without_the_extension_the_reason_is_told(monkeypatch) -> None:
    monkeypatch.setattr(packed_unet, "conv_rows_available", lambda: (False, "extension xdfast._C not built"))
    policy = make_policy()
    assert PolicyRunner(policy, 1).reason == "eager on cpu, denoiser by its modules: extension xdfast._C not built"
    with pytest.raises(ValueError, match="packed=True cannot be: denoiser by its modules: extension xdfast._C not"):
        PolicyRunner(policy, 1, packed=True)


def test_what_has_no_packed_form() -> None:
    assert packed_sampling(torch.nn.Linear(1, 1), CPU) == (None, "")
    policy = make_policy()
    assert packed_sampling(policy, torch.device("cuda"))[0] is None
    policy.diffusion.unet.double()
    assert "float32" in packed_sampling(policy, CPU)[1]
    with pytest.raises(ValueError, match="choose one"):
        PolicyRunner(make_policy(), 1, packed=True, compile=True)


def test_a_network_of_somebody_else_runs_as_it_is() -> None:
    class Quieter(ConditionalUnet1d):
        def denoise(self, actions, film):
            return 0.5 * super().denoise(actions, film)

    policy = make_policy()
    policy.diffusion.unet.__class__ = Quieter
    sample, why = packed_sampling(policy, CPU)
    assert sample is None and "not what is derived from it" in why
    policy = make_policy()
    policy.__class__ = type("Own", (type(policy),), {"core": property(lambda self: self.diffusion.loss)})
    sample, why = packed_sampling(policy, CPU)
    assert sample is None and "not what is derived from it" in why
