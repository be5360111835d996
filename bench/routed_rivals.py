"""Other ways to run a stack with given gates, each under its own name, on the same layers and weights.

All take x [B, T, D] and return [B, T, D]; those with gates take them as [U, L], 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import xdfast
from xdfast.nn.routed import RoutedStack

__all__ = [
    "compiled_dense",
    "dense",
    "index_add",
    "layers_of",
    "mask_multiply",
    "per_layer_loop",
    "torch_only",
    "xdfast_stack",
]

Forward = Callable[[Tensor], Tensor]
Gated = Callable[[Tensor, Tensor], Tensor]


def layers_of(stack: RoutedStack) -> list[nn.Module]:
    """The layers as they were before they were routed."""
    return [stack.get_submodule(str(number)) for number in range(stack.num_layers)]


def dense(stack: RoutedStack) -> Forward:
    """Every layer for everything, eager PyTorch."""
    layers = layers_of(stack)

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return forward


def compiled_dense(stack: RoutedStack, x: Tensor) -> Forward:
    """The same under torch.compile, compiled for x; for inference on the CPU with frozen, prepacked weights."""
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(*layers_of(stack)))
    # As an option of torch.compile, freezing comes too late: weights are inputs by then, and nothing is prepacked.
    with torch._inductor.config.patch(freezing=not stack.training and x.device.type == "cpu"):
        compiled(x)
    return compiled


def mask_multiply(stack: RoutedStack) -> Gated:
    """x + g · f(norm(x)) with everything computed, as routed models are trained and often run."""

    def forward(x: Tensor, gates: Tensor) -> Tensor:
        for number in range(stack.num_layers):
            g = gates[:, number].to(x.dtype).view(x.shape[0], -1, 1)
            seen = g[..., 0] > 0.5 if g.shape[1] > 1 and stack.keys == "active" else None
            for branch in stack.branches_of(number):
                x = x + g * branch.dense(x, seen=seen)
        return x

    return forward


def per_layer_loop(stack: RoutedStack) -> Gated | None:
    """A layer at a time on the samples that take it, as in ActDistill's public code with its position indices repaired.

    With tokens for units, as in public Mixture-of-Depths code: the same number of tokens of every sample is gathered, and
    they see one another; where they are to see all tokens there is no such loop (None).
    """
    layers = layers_of(stack)

    def samples(x: Tensor, gates: Tensor) -> Tensor:
        x = x.clone()
        for number, layer in enumerate(layers):
            mask = gates[:, number] > 0.5
            if mask.all():
                x = layer(x)
            elif mask.any():
                index = torch.nonzero(mask).squeeze(-1)
                x[index] = layer(x[index])
        return x

    def tokens(x: Tensor, gates: Tensor) -> Tensor:
        batch, _, width = x.shape
        for number, layer in enumerate(layers):
            mask = gates[:, number].view(batch, -1) > 0.5
            if mask.any():
                index = mask.nonzero()[:, 1].view(batch, -1, 1).expand(-1, -1, width)
                x = x.scatter(1, index, layer(x.gather(1, index)))
        return x

    if stack.unit == "sample":
        return samples
    return tokens if stack.keys == "active" else None


def index_add(stack: RoutedStack) -> Gated | None:
    """A branch at a time, its residual added to the samples that take it, as DINOv2 does for stochastic depth."""

    def forward(x: Tensor, gates: Tensor) -> Tensor:
        for number in range(stack.num_layers):
            index = torch.nonzero(gates[:, number] > 0.5).squeeze(-1)
            if index.numel():
                for branch in stack.branches_of(number):
                    x = x.index_add(0, index, branch.dense(x[index]))
        return x

    return forward if stack.unit == "sample" else None


def xdfast_stack(stack: RoutedStack, executor: str) -> RoutedStack:
    """The same layers, run by one of our executors."""
    layers = layers_of(stack)
    branches = [stack.branches_of(number) for number in range(stack.num_layers)]
    options = {"unit": stack.unit, "keys": stack.keys, "always_on": (), "sparse_train": stack.sparse_train}
    return RoutedStack(layers, branches, executor=executor, **options).train(stack.training)


def torch_only(stack: RoutedStack) -> Gated:
    """Our plan with plain PyTorch behind it: index_select, products of exactly the listed rows, index_add."""
    planned = xdfast_stack(stack, "planned")

    def forward(x: Tensor, gates: Tensor) -> Tensor:
        with xdfast.backend("torch"):
            return planned(x, gates)

    return forward
