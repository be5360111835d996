"""The executors ``graph`` and ``switch``: one sample on a GPU, its layers captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdfast.nn.branches import Branch
from xdfast.nn.packed import weights_state
from xdfast.nn.switched_graph import SwitchedGraph
from xdfast.ops.route import RouteList, RoutePlan, make_plan
from xdfast.ops.routed.triton import carried_statistics

if TYPE_CHECKING:
    from xdfast.nn.routed import RoutedStack

__all__ = ["PathGraphs"]


class PathGraphs:
    """Captured branches of a routed stack for one sample [1, T, D], all in place on one buffer. The decision is read once, by
    the host.

    ``switched=False``: a graph for every branch, which share one pool of memory; a path is a sequence of replays, so that 2^L
    paths need L · S graphs, and a skipped branch costs nothing. ``switched=True``: one graph of all branches, whose nodes are
    switched off and on where the decision differs from the last one: a single launch, no gap between layers, and a little for
    every node that is off (:class:`xdfast.nn.switched_graph.SwitchedGraph`).

    Graphs hold addresses and folded copies of weights: they are captured again when a parameter has changed
    (:func:`xdfast.nn.packed.weights_state`).
    """

    def __init__(self, stack: RoutedStack, switched: bool = False) -> None:
        self._stack, self.switched = stack, switched
        self._key: Any = None
        self._state: list[tuple[int, int, int]] = []
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._whole: SwitchedGraph | None = None
        self._x = self._statistics = torch.empty(0)
        self._plan: RoutePlan | None = None

    def __call__(self, x: Tensor, plan: RoutePlan) -> Tensor:
        """x [1, T, D] through the active branches of ``plan``, whose counts the host knows.

        Raises:
            ValueError: more than one sample.
        """
        if x.shape[0] != 1 or plan.units != 1:
            name = "switch" if self.switched else "graph"
            raise ValueError(
                f"executor={name!r} runs one sample at a time, got {x.shape[0]} samples in {plan.units} units; use 'list' or "
                "'planned'"
            )
        state = weights_state(self._stack.parameters())
        key = (x.shape, x.dtype, x.device, plan.branches, plan.plain)
        if key != self._key or state != self._state:
            self._capture(x, plan)
            self._key, self._state = key, state
        assert plan.host_counts is not None and self._plan is not None
        self._x.copy_(x[0])
        if not plan.plain:
            self._plan.gate.copy_(plan.gate)  # multipliers are read by the kernels
        self._statistics.copy_(carried_statistics(self._x))
        on = [
            plan.host_counts[number][min(branch_number, plan.branches - 1)] > 0
            for number in range(self._stack.num_layers)
            for branch_number in range(len(self._stack.branches_of(number)))
        ]
        if self._whole is not None:
            self._whole.replay(on)
        else:
            for graph, runs in zip(self._graphs, on):
                if runs:
                    graph.replay()
        return self._x.clone()[None]

    def _capture(self, x: Tensor, plan: RoutePlan) -> None:
        stack, tokens = self._stack, x.shape[1]
        self._x = x[0].clone()
        on = torch.ones(1, stack.num_layers, plan.branches, device=x.device)
        # Device-side lists with everything on; multipliers are those of the decision, overwritten before each replay.
        self._plan = make_plan(on, rows_per_unit=tokens, hard=plan.plain)
        self._statistics = carried_statistics(self._x)
        steps = [
            self._step(branch, self._plan.of(number, s), tokens)
            for number in range(stack.num_layers)
            for s, branch in enumerate(stack.branches_of(number))
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # weights are folded and kernels compiled outside a capture
            for step in steps:
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graphs, self._whole = [], None  # their memory first
        if self.switched:
            self._whole = SwitchedGraph(steps)
            return
        pool = torch.cuda.graph_pool_handle()
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
            self._graphs.append(graph)

    def _step(self, branch: Branch, route: RouteList, tokens: int) -> Callable[[], None]:
        def step() -> None:
            branch.carried(self._x, self._statistics, route, tokens, keys=self._stack.keys)

        return step

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
