"""A linear map prepared for inference on the CPU: weights in oneDNN's blocked layout, bias and activation fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from xdfast.ops.routed.reference import activate

__all__ = ["Folded", "PackedLinear", "packing_available", "weights_state"]

#: Activation → oneDNN's name and variant; others are applied afterwards.
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Elements of a weight on the CPU that are compared with what they were when it was folded.
_SAMPLE = 16


class _Steps:
    """Steps of any optimiser so far: fused ones (torch's, apex's) write weights without raising their versions."""

    count = 0


def _count_step(*_: Any) -> None:
    _Steps.count += 1


register_optimizer_step_post_hook(_count_step)


def packing_available(dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    """Whether oneDNN's prepacked linear can take weights of ``dtype`` here, and why (not)."""
    if not torch.backends.mkldnn.is_available():
        return False, "torch was built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return False, "oneDNN is switched off (torch.backends.mkldnn.enabled)"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False, f"torch {torch.__version__} has no prepacked linear"
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"prepacked weights are float32 or bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, "oneDNN needs AVX-512 or AVX-NE-CONVERT for bfloat16, which this CPU has not"
    return True, "oneDNN, prepacked weights with fused bias and activation"


def weights_state(weights: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """What differs after weights have changed, without looking at them.

    In-place writes raise a tensor's version, an exchange of its storage changes the address. Fused optimisers raise no version,
    so after any optimiser's step every weight that is trained counts as changed. Writes through ``.data`` stay unseen.
    """
    return [(t._version, t.data_ptr(), _Steps.count if t.requires_grad else 0) for t in weights]


class Folded:
    """What is computed from parameters once and kept until one of them changes.

    On the CPU a few elements of every weight are compared as well: writes through ``.data`` (moving averages, optimisers of
    one's own) leave no other trace, and change them all. A GPU cannot look without waiting:
    :meth:`xdfast.nn.RoutedStack.refold` is for it.

    Args:
        make: computes it from the parameters as they are now.
        sources: returns the parameters that ``make`` reads.
    """

    def __init__(self, make: Callable[[], Any], sources: Callable[[], list[Tensor]]) -> None:
        self._make, self._sources = make, sources
        self._state: list[tuple[int, int, int]] | None = None
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._value: Any = None

    def __call__(self) -> Any:
        sources = self._sources()
        state = weights_state(sources)
        if state != self._state or not self._as_sampled():
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "weights changed after they were folded for inference; run the model once before capturing a graph"
                )
            with torch.no_grad():
                self._value = self._make()
            self._state = state
            looked_at = (
                _sampled(t) for t in sources if t.device.type == "cpu" and t.dim() > 1 and _in_order(t) is not None
            )
            self._samples = [(elements, elements.clone()) for elements in looked_at]
        return self._value

    def _as_sampled(self) -> bool:
        if torch.jit.is_tracing():  # a trace would hold the comparison
            return True
        return all(torch.equal(now, before) for now, before in self._samples)


def _in_order(weight: Tensor) -> Tensor | None:
    """A view whose elements follow each other in memory, or None."""
    if weight.is_contiguous():
        return weight
    last = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight
    return last if last.is_contiguous() else None


def _sampled(weight: Tensor) -> Tensor:
    """A view of a few elements from all over a weight, as integers: NaN equals itself then."""
    order = _in_order(weight)
    assert order is not None
    whole = order.detach().view(_BITS[weight.dtype.itemsize]).view(-1)
    return whole[:: max(1, whole.numel() // _SAMPLE)]


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
        if not packing_available(weight.dtype)[0]:
            return weight, bias, None
        return weight, bias, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)
