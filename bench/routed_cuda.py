"""CUDA graphs of candidates, and what is not known before a first run on a GPU: what a kernel and a replay cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from xdfast.nn.switched_graph import checked

__all__ = ["graph_costs", "graphed", "host_work", "node_costs"]

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def graphed(step: Callable[[], Any]) -> Callable[[], Any] | None:
    """``step`` captured in a CUDA graph, its result returned by each replay; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return found

    return replay


def _microseconds(step: Callable[[], Any], repeats: int = 50) -> float:
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples) * 1e6


def graph_costs(kernels: int = 1000, layers: int = 32) -> dict[str, float]:
    """Microseconds of a kernel that does nothing in a graph, of one more graph in a row of replays, of a launch without a
    graph, and of one product by ``grouped_mm`` with a device-side number of rows against ``mm``."""
    cell = torch.zeros(1, device="cuda")

    def many(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                cell.add_(0)

        return run

    one_graph, empty = graphed(many(kernels)), graphed(many(1))
    parts = [graphed(many(kernels // layers)) for _ in range(layers)]
    joined = graphed(many(kernels // layers * layers))
    if one_graph is None or empty is None or joined is None or None in parts:
        raise RuntimeError("a kernel that adds zero cannot be captured in a CUDA graph")
    whole = _microseconds(joined)
    apart = _microseconds(lambda: [replay() for replay in parts if replay is not None])
    found = {
        "empty_kernel_in_graph_us": (_microseconds(one_graph) - _microseconds(empty)) / (kernels - 1),
        "replay_of_one_kernel_us": _microseconds(empty),
        "gap_between_layer_graphs_us": (apart - whole) / (layers - 1),
        "launch_without_graph_us": _microseconds(many(kernels)) / kernels,
    }
    found |= node_costs(kernels)
    grouped = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped is not None:
        x = torch.randn(16 * 197 // 2 // 16 * 16, 768, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(1, 768, 3072, device="cuda", dtype=torch.bfloat16)
        ends = torch.tensor([x.shape[0]], device="cuda", dtype=torch.int32)
        try:
            found["grouped_mm_us"] = _microseconds(lambda: grouped(x, w, offs=ends))
        except RuntimeError:
            return found  # not on this architecture
        found["mm_us"] = _microseconds(lambda: x @ w[0])
    return found


def host_work(step: Callable[[], Any], steps: int = 1) -> dict[str, float]:
    """Launches (of kernels and graphs) and waits for the device that the host makes in a step, by torch's profiler."""
    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        with torch.profiler.record_function("xdfast: done"):
            pass
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    done = next((n for n, event in enumerate(events) if event.name == "xdfast: done"), len(events))
    names = [event.name for event in events[:done]]  # the profiler itself waits at its end
    return {
        "launches": sum(name in _LAUNCHES for name in names) / steps,
        "waits": sum(name in _WAITS for name in names) / steps,
    }


def node_costs(kernels: int = 1000) -> dict[str, float]:
    """Microseconds to switch a node of a captured graph off or on, what a replay costs after that, what a node that is off and a
    conditional node that is not taken cost in it: they decide between replaying graphs by layer and one graph with switches.

    Empty without cuda-bindings (torch's wheels for CUDA 13 bring it).
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return {}
    cell = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            cell.add_(0)
    raw = graph.raw_cuda_graph()
    count = checked(runtime.cudaGraphGetNodes(raw))[-1]
    nodes = checked(runtime.cudaGraphGetNodes(raw, count))[0]
    executable = checked(runtime.cudaGraphInstantiate(raw, 0))[0]
    stream = torch.cuda.current_stream().cuda_stream

    def launch() -> None:
        checked(runtime.cudaGraphLaunch(executable, stream))

    def switch(on: int) -> None:
        for node in nodes:
            checked(runtime.cudaGraphNodeSetEnabled(executable, node, on))

    launch()
    on, switched, off, states = _microseconds(launch), [], [], (0, 1)
    for repeat in range(20):
        begin = time.perf_counter()
        switch(states[repeat % 2])
        switched.append((time.perf_counter() - begin) * 1e6 / len(nodes))
        first = _microseconds(launch, 1)
        if repeat % 2 == 0:
            off.append((first, _microseconds(launch, 5)))
    checked(runtime.cudaGraphExecDestroy(executable))
    found = {
        "switch_a_node_us": statistics.median(switched),
        "node_that_is_off_us": statistics.median(later for _, later in off) / len(nodes),
        "first_replay_after_switching_us": statistics.median(first for first, _ in off),
        "replay_with_all_on_us": on,
    }
    return found | {"if_node_not_taken_us": _if_node(runtime, min(kernels, 200), stream)}


def _if_node(runtime: Any, count: int, stream: int) -> float:
    """Microseconds of a conditional node whose body, an empty node, is not run; they stand in a row."""
    graph = checked(runtime.cudaGraphCreate(0))[0]
    before: list[Any] = []
    for _ in range(count):
        handle = checked(runtime.cudaGraphConditionalHandleCreate(graph, 0, 1))[0]  # 0 at every launch
        params = runtime.cudaGraphNodeParams()
        params.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = handle
        params.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        params.conditional.size = 1
        before = [checked(runtime.cudaGraphAddNode(graph, before, None, len(before), params))[0]]
        checked(runtime.cudaGraphAddEmptyNode(params.conditional.phGraph_out[0], [], 0))
    executable = checked(runtime.cudaGraphInstantiate(graph, 0))[0]
    taken = _microseconds(lambda: checked(runtime.cudaGraphLaunch(executable, stream)))
    checked(runtime.cudaGraphExecDestroy(executable))
    checked(runtime.cudaGraphDestroy(graph))
    return taken / count
