"""A linear map prepared for inference on the CPU: weights in oneDNN's blocked layout, bias and activation fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xdfast.ops.routed.reference import activate

__all__ = ["Folded", "PackedLinear", "packing_available"]

#: Activation → oneDNN's name and variant; others are applied afterwards.
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


def packing_available() -> tuple[bool, str]:
    """Whether this build of torch has oneDNN's prepacked linear, and why (not)."""
    if not torch.backends.mkldnn.is_available():
        return False, "torch was built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return False, "oneDNN is switched off (torch.backends.mkldnn.enabled)"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False, f"torch {torch.__version__} has no prepacked linear"
    return True, "oneDNN, prepacked weights with fused bias and activation"


class Folded:
    """What is computed from parameters once and kept until one of them changes.

    Args:
        make: computes it from the parameters as they are now.
        sources: returns the parameters that ``make`` reads.
    """

    def __init__(self, make: Callable[[], Any], sources: Callable[[], list[Tensor]]) -> None:
        self._make, self._sources = make, sources
        self._state: list[tuple[int, int]] | None = None
        self._value: Any = None

    def __call__(self) -> Any:
        # Changes with any in-place write (an optimiser's step, load_state_dict) and any exchange of storage.
        state = [(t._version, t.data_ptr()) for t in self._sources()]
        if state != self._state:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "weights changed after they were folded for inference; run the model once before capturing a graph"
                )
            with torch.no_grad():
                self._value = self._make()
            self._state = state
        return self._value


class PackedLinear:
    """act(x Wᵀ + b) with W reordered once; knows when its parameters have changed since.

    Args:
        parts: returns (weight [F, K], bias [F] or None) as they are now; several linear maps may be joined here, or a
            scale multiplied in.
        sources: returns the parameters that ``parts`` reads.
        act: activation after it, of :data:`xdfast.ops.routed.ACTIVATIONS`.
        rows: how many rows a call will have, roughly; oneDNN chooses its layout by it.
    """

    def __init__(
        self,
        parts: Callable[[], tuple[Tensor, Tensor | None]],
        sources: Callable[[], list[Tensor]],
        act: str,
        rows: int,
    ) -> None:
        self._parts, self.act, self._rows = parts, act, rows
        self._current = Folded(self._prepare, sources)

    def __call__(self, x: Tensor) -> Tensor:  # [n, K] → [n, F]
        weight, bias, packed = self._current()
        if packed is None or x.shape[0] == 0 or torch.jit.is_tracing():  # a trace cannot hold the opaque weight
            return activate(functional.linear(x, weight, bias), self.act)
        name, variant = _FUSED.get(self.act, ("none", ""))
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], variant)
        return y if self.act in _FUSED else activate(y, self.act)

    def _prepare(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weight, bias = self._parts()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16) or not packing_available()[0]:
            return weight, bias, None
        return weight, bias, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)
