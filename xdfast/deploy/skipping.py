"""Routed layers in an exported graph: under conditions, so that what is off is not computed, or all of them with their gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn import routed_stacks
from xdfast.nn.routed import RoutedStack

__all__ = ["skip_layers"]


def skip_layers(model: nn.Module, *, skip: bool) -> str:
    """Prepares the routed stacks of a model for an exporter, in place.

    Exporters know no lists of rows whose length depends on the data, which is how xdfast skips layers of a batch. For one
    sample there is a graph that skips: x ← x + g · f(norm(x)) under ``torch.cond(g > 1/2)`` (ONNX: ``If``). For batches every
    layer is computed and multiplied by its gate: the same values, nothing saved.

    Args:
        model: changed; copy it before.
        skip: conditions, for batch 1.

    Returns:
        a sentence for the record.

    Raises:
        ValueError: conditions for a stack that routes tokens or blocks, each of which decides for itself.
    """
    for stack in routed_stacks(model):
        if skip and stack.unit != "sample":
            raise ValueError(
                f"layers routed by {stack.unit} cannot be skipped as a whole in an exported graph; use skip=False (--no-skip): all "
                "layers are computed, with their gates"
            )
        stack.executor = "dense_mask"
        # both ways through a stack (at once, or block by block by the model's own loop) end there
        stack._dense_layer = partial(_conditional_layer if skip else _gated_layer, stack)  # type: ignore[assignment]
    if skip:
        return "one sample at a time; layers that are off are not computed (conditions in the graph)"
    return "any number of samples; all layers are computed and multiplied by their gates, so that nothing is saved"


def _conditional_layer(stack: RoutedStack, x: Tensor, gates: Tensor, number: int, context: dict[str, Any]) -> Tensor:
    """One layer for x [1, T, D] and gates [1, L, S]."""
    active = stack.active(gates)
    for index, branch in enumerate(stack.branches_of(number)):
        if number in stack.always_on:
            x = x + branch.dense(x, **context)
            continue
        place = (0, number, min(index, gates.shape[2] - 1))

        def on(x: Tensor, gate: Tensor, branch: Any = branch) -> Tensor:
            return x + gate.to(x.dtype) * branch.dense(x, **context)

        def off(x: Tensor, gate: Tensor) -> Tensor:
            return x.clone()  # an output must not be an input

        x = torch.cond(active[place], on, off, (x, gates[place]))
    return x


def _gated_layer(stack: RoutedStack, x: Tensor, gates: Tensor, number: int, context: dict[str, Any]) -> Tensor:
    """One layer for x [B, T, D]; soft gates that are not active become 0, as the lists leave them out."""
    left = torch.where(stack.active(gates), gates, torch.zeros_like(gates))
    return type(stack)._dense_layer(stack, x, left, number, context)
