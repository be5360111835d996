"""The executor ``graph``: one sample on a GPU, every layer a captured CUDA graph, a path a sequence of replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdfast.nn.branches import Branch
from xdfast.nn.packed import weights_state
from xdfast.ops.route import RouteList, RoutePlan, make_plan
from xdfast.ops.routed.triton import carried_statistics

if TYPE_CHECKING:
    from xdfast.nn.routed import RoutedStack

__all__ = ["PathGraphs"]


class PathGraphs:
    """Captured branches of a routed stack for one sample [1, T, D].

    A skipped branch costs nothing: its graph is not replayed. All graphs work in place on one buffer and share one pool of
    memory; any path is a sequence of replays, so that 2^L paths need L · S graphs. The decision is read once, by the host.

    Graphs hold addresses and folded copies of weights: they are captured again when a parameter has changed
    (:func:`xdfast.nn.packed.weights_state`).
    """

    def __init__(self, stack: RoutedStack) -> None:
        self._stack = stack
        self._key: Any = None
        self._state: list[tuple[int, int, int]] = []
        self._graphs: list[list[torch.cuda.CUDAGraph]] = []
        self._x = self._statistics = torch.empty(0)
        self._plan: RoutePlan | None = None

    def __call__(self, x: Tensor, plan: RoutePlan) -> Tensor:
        """x [1, T, D] through the active branches of ``plan``, whose counts the host knows.

        Raises:
            ValueError: more than one sample.
        """
        if x.shape[0] != 1 or plan.units != 1:
            raise ValueError(
                f"executor='graph' runs one sample at a time, got {x.shape[0]} samples in {plan.units} units; use 'list' or "
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
        for number, row in enumerate(self._graphs):
            for branch_number, graph in enumerate(row):
                if plan.host_counts[number][min(branch_number, plan.branches - 1)]:
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
            [self._step(branch, self._plan.of(number, s), tokens) for s, branch in enumerate(stack.branches_of(number))]
            for number in range(stack.num_layers)
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # weights are folded and kernels compiled outside a capture
            for row in steps:
                for step in row:
                    step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        self._graphs = []
        for row in steps:
            self._graphs.append([])
            for step in row:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    step()
                self._graphs[-1].append(graph)

    def _step(self, branch: Branch, route: RouteList, tokens: int) -> Callable[[], None]:
        def step() -> None:
            branch.carried(self._x, self._statistics, route, tokens, keys=self._stack.keys)

        return step

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
