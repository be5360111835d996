"""The denoiser against a plain reading of its equations, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from xdfast.robot.unet1d import ConditionalUnet1d

pytestmark = pytest.mark.usefixtures("one_thread")


def _plain(net: ConditionalUnet1d, actions, steps, condition):
    """One block after the other, each with its own FiLM of the joined vector, as the paper draws it."""
    joined = torch.cat([net.time_mlp(steps.to(torch.float64)), condition], dim=1)
    weight = torch.cat([net.film_time.weight, net.film_condition.weight], dim=1)
    film = F.linear(F.mish(joined), weight, net.film_condition.bias)
    position = 0

    def block(module, x):
        nonlocal position
        outputs = module.first[0].out_channels
        scale = film[:, position : position + outputs, None, None]
        shift = film[:, position + outputs : position + 2 * outputs, None, None]
        position += 2 * outputs
        h = module.first(x)
        return module.second((1 + scale) * h + shift) + module.skip(x)

    x = actions.transpose(1, 2)[:, :, None]
    kept = []
    for level, pair in enumerate(net.down):
        x = block(pair[1], block(pair[0], x))
        kept.append(x)
        x = net.shrink[level](x) if level < len(net.shrink) else x
    for module in net.middle:
        x = block(module, x)
    for pair, grow in zip(net.up, net.grow):
        x = grow(block(pair[1], block(pair[0], torch.cat([x, kept.pop()], dim=1))))
    assert position == film.shape[1]
    return net.last(x)[:, :, 0].transpose(1, 2)


@pytest.mark.parametrize(("widths", "horizon"), [((16,), 5), ((16, 32), 8), ((8, 16, 24), 16)])
def test_values_and_gradients_equal_the_plain_equations(widths, horizon) -> None:
    net = ConditionalUnet1d(3, 7, widths=widths, time_dim=16).double()
    actions = torch.randn(4, horizon, 3, dtype=torch.float64, requires_grad=True)
    condition = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    steps = torch.tensor([0, 3, 50, 99])
    results = []
    for function in (net, lambda *given: _plain(net, *given)):
        out = function(actions, steps, condition)
        results.append([out, *torch.autograd.grad(out.square().sum(), [actions, condition, *net.parameters()])])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_condition_and_time_are_heard() -> None:
    net = ConditionalUnet1d(2, 5, widths=(16, 32))
    x, c = torch.randn(1, 8, 2), torch.randn(1, 5)
    t = torch.tensor([10])
    assert net(x, t, c).shape == (1, 8, 2)
    assert not torch.allclose(net(x, t, c), net(x, t, c + 1))
    assert not torch.allclose(net(x, t, c), net(x, t + 5, c))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": (20,)}, r"multiples of 8 .* got \(20,\)"),
        ({"widths": ()}, r"multiples of 8"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"time_dim": 7}, "time_dim must be even, got 7"),
    ],
)
def test_bad_sizes(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalUnet1d(2, 5, **given)
