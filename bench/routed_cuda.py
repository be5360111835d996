"""CUDA graphs of candidates, and what is not known before a first run on a GPU: what a kernel and a replay cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["graph_costs", "graphed"]


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
