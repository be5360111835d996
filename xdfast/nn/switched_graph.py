"""A CUDA graph of several steps that can be switched off one by one, without capturing or instantiating it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["SwitchedGraph", "checked", "cuda_runtime"]

#: The kinds of nodes that ``cudaGraphNodeSetEnabled`` takes.
_CAN_BE_OFF = ("Kernel", "Memset", "Memcpy")


def cuda_runtime() -> Any:
    """The CUDA runtime's Python bindings.

    Raises:
        RuntimeError: they are not installed; torch's wheels for CUDA 13 bring them.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise RuntimeError(
            "executor='switch' needs the CUDA runtime's bindings: pip install cuda-bindings (of the CUDA version of torch, "
            f"{torch.version.cuda}); or use executor='graph'"
        ) from error
    return runtime


def checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the CUDA runtime returns behind its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return tuple(values)


class SwitchedGraph:
    """Steps captured one after another in one graph; :meth:`replay` runs those that are on.

    A step that is off is not removed: its nodes do nothing, by ``cudaGraphNodeSetEnabled``. Switching takes a call of the
    runtime per node whose state changes and none where the same steps are on as in the last replay; a launch already given to
    the device is not affected by later switching. Everything is on at first.

    Args:
        steps: called once each while the graph is captured; they must have run before, so that nothing is allocated, compiled
            or prepared in them for the first time.

    Raises:
        RuntimeError: no CUDA bindings; a step that cannot be captured, or leaves a node that cannot be switched off.
    """

    def __init__(self, steps: Sequence[Callable[[], None]]) -> None:
        runtime = cuda_runtime()
        self._runtime = runtime
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)  # owns the memory that its kernels use
        self._nodes: list[list[Any]] = []
        known: set[int] = set()
        with torch.cuda.graph(self._graph):
            stream = torch.cuda.current_stream().cuda_stream
            for step in steps:
                step()
                # status, id, graph, …: a graph that is being captured can be asked for its nodes
                found = _nodes(runtime, checked(runtime.cudaStreamGetCaptureInfo(stream))[2])
                self._nodes.append([node for node in found if int(node) not in known])
                known.update(int(node) for node in found)
        for nodes in self._nodes:
            for node in nodes:
                kind = checked(runtime.cudaGraphNodeGetType(node))[0].name.removeprefix("cudaGraphNodeType")
                if kind not in _CAN_BE_OFF:
                    raise RuntimeError(
                        f"a layer leaves a node of kind {kind} in its CUDA graph, which cannot be switched off; use "
                        "executor='graph'"
                    )
        self._executable = checked(runtime.cudaGraphInstantiate(self._graph.raw_cuda_graph(), 0))[0]
        weakref.finalize(self, runtime.cudaGraphExecDestroy, self._executable)
        self._on = [True] * len(self._nodes)

    def replay(self, on: Sequence[bool]) -> None:
        """Runs the steps that are on, on the current stream.

        Raises:
            ValueError: another number of steps.
        """
        if len(on) != len(self._on):
            raise ValueError(f"the graph has {len(self._on)} steps, got {len(on)} states")
        runtime = self._runtime
        for number, (now, before) in enumerate(zip(on, self._on)):
            if bool(now) != before:
                for node in self._nodes[number]:
                    checked(runtime.cudaGraphNodeSetEnabled(self._executable, node, int(now)))
                self._on[number] = bool(now)
        checked(runtime.cudaGraphLaunch(self._executable, torch.cuda.current_stream().cuda_stream))


def _nodes(runtime: Any, graph: Any) -> list[Any]:
    count = checked(runtime.cudaGraphGetNodes(graph))[-1]
    return list(checked(runtime.cudaGraphGetNodes(graph, count))[0])[:count] if count else []
