"""Weights prepared once: made anew whenever they may have changed, and only then."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from xdfast.nn.packed import Folded, PackedLinear, packing_available


def folded(*weights: torch.Tensor) -> tuple[Folded, list[int]]:
    """What sums its weights, and how often it did."""
    made: list[int] = []

    def make() -> float:
        made.append(1)
        return sum(float(w.sum()) for w in weights)

    return Folded(make, lambda: list(weights)), made


def test_it_is_made_once_for_the_same_weights() -> None:
    weight = nn.Parameter(torch.randn(40, 30))
    value, made = folded(weight, nn.Parameter(torch.randn(40)))
    assert value() == value() == value() and len(made) == 1
    with torch.no_grad():
        weight.add_(1)
    value()
    assert value() == value() and len(made) == 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 30), (1000, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_through_data_is_seen(shape, dtype) -> None:
    weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    value, made = folded(weight)
    before = value()
    weight.data.mul_(2)
    assert value() == pytest.approx(2 * before, rel=1e-2) and len(made) == 2


def test_weights_that_are_nan_are_not_prepared_again_and_again() -> None:
    value, made = folded(torch.full((4, 4), float("nan")))
    value(), value()
    assert len(made) == 1


def test_a_step_of_another_model_does_not_touch_frozen_weights() -> None:
    frozen, other = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    value, made = folded(frozen.weight)
    value()
    other(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    value()
    assert len(made) == 1
    frozen.requires_grad_()
    value()
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_a_packed_linear_is_a_linear_whatever_this_cpu_can_pack(dtype, act) -> None:
    linear = nn.Linear(24, 20).to(dtype)
    packed = PackedLinear(lambda: (linear.weight, linear.bias), lambda: [linear.weight, linear.bias], act, 7)
    x = torch.randn(7, 24).to(dtype)
    with torch.no_grad():
        wide = functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        exact = {
            "none": lambda t: t,
            "gelu": functional.gelu,
            "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
            "relu": functional.relu,
            "silu": functional.silu,
        }[act](wide)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
        torch.testing.assert_close(packed(x).double(), exact, rtol=tolerance, atol=tolerance)


def test_what_can_be_packed_is_said_with_its_reason() -> None:
    assert packing_available()[0] == packing_available(torch.float32)[0]
    assert not packing_available(torch.float16)[0] and "float16" in packing_available(torch.float16)[1]
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert packing_available(torch.bfloat16)[0] == (supported and packing_available()[0])
