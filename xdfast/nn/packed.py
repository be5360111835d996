"""A linear map prepared for inference on the CPU: weights in oneDNN's blocked layout, bias and activation fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from xdfast.ops.routed.reference import activate

__all__ = ["PackedLinear", "packing_available"]

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
        self._parts, self._sources, self.act, self._rows = parts, sources, act, rows
        self._state: list[tuple[int, int]] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:  # [n, K] → [n, F]
        if self._state != self._versions():
            self._prepare()
        if self._packed is None or x.shape[0] == 0 or torch.jit.is_tracing():  # a trace cannot hold the opaque weight
            assert self._weight is not None
            return activate(functional.linear(x, self._weight, self._bias), self.act)
        name, variant = _FUSED.get(self.act, ("none", ""))
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, name, [], variant)
        return y if self.act in _FUSED else activate(y, self.act)

    def _versions(self) -> list[tuple[int, int]]:
        """Changes with any in-place write (an optimiser's step, load_state_dict) and any exchange of storage."""
        return [(t._version, t.data_ptr()) for t in self._sources()]

    def _prepare(self) -> None:
        with torch.no_grad():
            weight, bias = self._parts()
            self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
            self._packed = None
            if weight.dtype in (torch.float32, torch.bfloat16) and packing_available()[0]:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), self._rows)
        self._state = self._versions()
