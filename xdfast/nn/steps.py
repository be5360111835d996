"""A routed stack where a model expects its list of blocks: called at once, or block by block by the model's own loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.branches import Branch
from xdfast.nn.routed import Decision, RoutedStack
from xdfast.nn.router import LayerRouter
from xdfast.ops.route import RoutePlan
from xdfast.ops.routed.rows import RowPasses

__all__ = ["CACHES", "RoutedBlocks", "fixed_gates", "routed_stacks"]

log = logging.getLogger("xdfast")

#: Names under which transformers hands layers their key-value cache: since 5.24 the first, before the second.
CACHES = ("cache", "past_key_values", "past_key_value")


class RoutedBlocks(RoutedStack):
    """A :class:`RoutedStack` that also stands in for the ``nn.Sequential`` or ``nn.ModuleList`` it replaced.

    ``for block in blocks: x = block(x)``, slices and ``len`` work as before: a loop yields one callable per layer, the first
    decides for all, and what they share lives as long as the loop; two passes at a time do not meet. ``blocks[3]`` is the
    original layer. Forward hooks on layers are called with the layer's input and output, of all samples.

    Args:
        takes: names of keyword arguments that the branches understand (``rope``, ``past_key_values``); others are refused
            instead of being lost.
        options: of :class:`RoutedStack`.

    Raises:
        ValueError: in use: arguments that the branches cannot take; see :class:`RoutedStack`.
        RuntimeError: layers called out of order.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        branches: Sequence[Sequence[Branch]],
        router: LayerRouter | None = None,
        *,
        takes: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(layers, branches, router, **options)
        self.takes = frozenset(takes)
        self.given_gates: Tensor | None = None
        self._told_graph = False

    def forward(self, x: Tensor, gates: Tensor | None = None, *, mask: Tensor | None = None, **context: Any) -> Tensor:
        gates = self.given_gates if gates is None else gates
        layers = [self[number] for number in range(self.num_layers)]
        if not context and not any(layer._forward_hooks for layer in layers):
            return super().forward(x, gates, mask=mask)
        run = Pass(self, gates, mask)
        for number in range(self.num_layers):
            x = run.layer(number, x, context)
        return x

    def begin(
        self, x: Tensor, gates: Tensor | None, mask: Tensor | None, context: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, str]:
        """(gates, probabilities, executor) of a pass over x [B, T, D], decided at its first layer."""
        probabilities = None
        if gates is None:
            gates, probabilities = self.route(x, mask)
        gates = self._forced_on(self._checked(gates, x))
        executor = self.choose(x, gates)[0]
        if executor in ("graph", "switch"):
            asked, executor = executor, "planned"
            if not self._told_graph:
                self._told_graph = True
                log.warning(
                    f"executor={asked!r} replays the whole stack; layer by layer (a model's own loop, forward hooks, arguments "
                    "for the layers) it runs as 'planned'"
                )
        return gates, probabilities, executor

    def understood(self, context: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for the branches.

        Raises:
            ValueError: one that they do not know and that says something.
        """
        for name, value in context.items():
            if name not in self.takes and value is not None and value is not False:
                known = f"; they take {', '.join(sorted(self.takes))}" if self.takes else ""
                raise ValueError(f"the routed layers were called with {name}=, which they cannot take{known}")
        return {name: value for name, value in context.items() if name in self.takes}

    def __len__(self) -> int:
        return self.num_layers

    def __iter__(self) -> Iterator[Any]:
        return iter(Steps(self, self.num_layers))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            chosen = range(self.num_layers)[index]
            if chosen != range(len(chosen)):
                raise ValueError("only the first layers of a routed stack can be run alone: the first one decides")
            return Steps(self, len(chosen))
        return self.get_submodule(str(range(self.num_layers)[index]))


class Steps(Sequence[Any]):
    """The first layers of a stack as callables; every loop over them is a pass of its own."""

    def __init__(self, stack: RoutedBlocks, length: int) -> None:
        self.stack, self.length = stack, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        run = Pass(self.stack, self.stack.given_gates, None)
        return (Step(run, number) for number in range(self.length))

    def __getitem__(self, index: Any) -> Any:
        return self.stack[range(self.length)[index]] if isinstance(index, int) else self.stack[: self.length][index]


class Step:
    """One layer of one pass; its attributes are the layer's."""

    def __init__(self, run: Pass, number: int) -> None:
        self._run, self._number = run, number

    def __call__(self, x: Tensor, *positional: Any, **context: Any) -> Tensor:
        if positional:
            raise TypeError(
                f"a routed layer takes its input and keyword arguments, got {1 + len(positional)} positional"
            )
        return self._run.layer(self._number, x, context)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._run.stack[self._number], name)


@dataclass
class Pass:
    """What the layers of one pass share."""

    stack: RoutedBlocks
    given: Tensor | None
    mask: Tensor | None
    gates: Tensor | None = None
    plan: RoutePlan | None = None
    rows: RowPasses | None = None

    def layer(self, number: int, x: Tensor, context: dict[str, Any]) -> Tensor:
        """Layer ``number`` for x [B, T, D]; x itself where no sample takes it."""
        stack = self.stack
        checkpointing = getattr(stack[number], "gradient_checkpointing", False) and stack.training
        if checkpointing:  # what Hugging Face's own layers do: the second forward pass must not write keys again
            context = {**context, **{name: None for name in CACHES if name in context}, "use_cache": False}
        known = stack.understood(context)
        if number == 0:
            self._begin(x, known)
        elif self.gates is None:
            raise RuntimeError(f"layer {number} of a routed stack was called before layer 0, which decides for all")
        if checkpointing:
            out = stack[number]._gradient_checkpointing_func(lambda y: self._compute(number, y, known), x)
        else:
            out = self._compute(number, x, known)
        return _hooked(stack[number], x, context, out)

    def _begin(self, x: Tensor, context: dict[str, Any]) -> None:
        if x.dim() != 3:
            raise ValueError(f"a routed stack takes [B, T, D], got {list(x.shape)}")
        gates, probabilities, executor = self.stack.begin(x, self.given, self.mask, context)
        self.gates = gates
        if executor != "dense_mask":
            self.plan = self.stack.plan(x, gates, host=executor != "list")
            self.rows = self.stack._rows(x) if executor == "cpu" else None
        self.stack.decision = Decision(gates, probabilities, self.plan, executor)

    def _compute(self, number: int, x: Tensor, context: dict[str, Any]) -> Tensor:
        stack = self.stack
        if self.plan is None:
            assert self.gates is not None
            return stack._dense_layer(x, self.gates, number, context)
        counts = self.plan.host_counts
        if counts is not None and not any(counts[number]):
            return x
        flat = x.reshape(-1, x.shape[2])
        if not torch.is_grad_enabled():
            flat = flat.clone()  # the branches then add in place; models keep the states between layers
        return stack._listed_layer(flat, x.shape[1], self.plan, number, self.rows, context).view(x.shape)


def _hooked(layer: nn.Module, x: Tensor, context: dict[str, Any], out: Tensor) -> Tensor:
    """Calls the layer's forward hooks, as ``layer(x)`` would."""
    for key, hook in layer._forward_hooks.items():
        with_names = key in getattr(layer, "_forward_hooks_with_kwargs", ())
        changed = hook(layer, (x,), context, out) if with_names else hook(layer, (x,), out)
        out = out if changed is None else changed
    return out


def routed_stacks(model: nn.Module) -> list[RoutedStack]:
    """The routed stacks in a model, in the order of its modules.

    Example:
        >>> import timm, xdfast.nn
        >>> model = xdfast.nn.route(timm.create_model("test_vit"), 0.9, always_on=(0,))
        >>> [stack.num_layers for stack in xdfast.nn.routed_stacks(model)]
        [6]
    """
    return [module for module in model.modules() if isinstance(module, RoutedStack)]


@contextlib.contextmanager
def fixed_gates(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Within the block the model's routed stack takes these gates instead of asking its router.

    Args:
        model: with one stack made by :func:`xdfast.nn.route`.
        gates: [U, L] or [U, L, S] in [0, 1]; 1 computes everything: the dense model.

    Raises:
        ValueError: no such stack, or several; in use: gates of another shape, or with a KV cache other gates than those
            with which it was filled.
    """
    stacks = [stack for stack in routed_stacks(model) if isinstance(stack, RoutedBlocks)]
    if len(stacks) != 1:
        raise ValueError(
            f"fixed_gates needs a model with one routed stack, made by route(); this one has {len(stacks)}"
        )
    before, stacks[0].given_gates = stacks[0].given_gates, gates
    try:
        yield
    finally:
        stacks[0].given_gates = before
