"""Measures routed stacks: ours by share of active work, dense stacks and other ways to skip, in one interleaved run."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xdfast.nn.routed import RoutedStack
from xdfast.nn.routed_flops import count_routed
from xdfast.nn.router import LayerRouter

from . import routed_rivals as rivals
from .harness import interleave, peak_memory, ratios
from .routed_cases import SIZES, RoutedCase, build
from .routed_cuda import graphed, host_work

__all__ = ["MUST_REACH", "OURS", "candidates", "check", "measure", "targets"]

OURS = "xdfast"

#: CPU, B = 16, T = 197, exact shares: (size, dtype) → share → rival → at least so many times faster.
_BF16 = {
    0.5: {"eager": 1.9, "compiled": 1.7, "loop": 1.15},
    0.25: {"eager": 3.0, "compiled": 2.6, "loop": 1.15},
    1.0: {"strongest dense": 0.95},
}
_FP32 = {0.5: {"eager": 1.95}, 0.25: {"eager": 3.7}, 1.0: {"strongest dense": 0.95}}
MUST_REACH = {(s, d): t for s in ("S", "B") for d, t in (("bfloat16", _BF16), ("float32", _FP32))}
_SMALL_BATCH = {0.5: {"graphed dense": 1.5, "loop": 2.0}, 0.25: {"graphed dense": 2.0}, 1.0: {"strongest dense": 0.95}}
#: CUDA (an H200), bfloat16: (size, batch) → as above; batch 1: a path, half of the layers. "graphed dense": the fastest of the
#: dense stacks in a CUDA graph; "all active": ours with everything on. vla-7b is a VLA's whole backbone.
CUDA_MUST_REACH = {
    ("S", 16): _SMALL_BATCH,
    ("B", 16): _SMALL_BATCH,
    ("B", 64): {0.5: {"graphed dense": 1.6}, 0.25: {"graphed dense": 2.7}, 1.0: {"strongest dense": 0.95}},
    ("llama-7b", 16): {0.5: {"graphed dense": 1.75}, 0.25: {"graphed dense": 2.9}, 1.0: {"strongest dense": 0.95}},
    ("S", 1): {0.5: {"all active": 1.6}},
    ("B", 1): {0.5: {"all active": 1.75}},
    ("llama-7b", 1): {0.5: {"all active": 1.95}},
    ("vla-7b", 1): {0.5: {"eager": 1.75}},
    ("vla-7b", 16): {0.5: {"eager": 1.75}},
}
#: A training step with half of the work active against the dense one.
TRAIN_MUST_REACH = 1.5

#: Largest error against float64, relative to the largest value.
_ALLOWED = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

DENSE = ("eager", "compiled", "eager graph", "compiled graph")


def candidates(
    case: RoutedCase, stack: RoutedStack, x: Tensor, *, compiled: bool = True
) -> dict[str, Callable[[], Tensor | None]]:
    """What is timed: dense stacks by name, the others as ``NAME @ SHARE``; a path runs all of its steps."""
    device = x.device.type
    plain = rivals.dense(stack)
    timed: dict[str, Callable[[], Any]] = {"eager": lambda: plain(x)}
    if compiled:
        fast = rivals.compiled_dense(stack, x)
        timed["compiled"] = lambda: fast(x)
    if device == "cuda":
        for name in list(timed):
            _add_graph(timed, name, name)
    ways: dict[str, rivals.Gated | None] = {"loop": rivals.per_layer_loop(stack)}
    some = {"index_add": rivals.index_add(stack), "torch-only": rivals.torch_only(stack)}
    for share in case.shares:
        gates = case.gates_at(share, device)
        here = dict(ways)
        if 0.25 <= share <= 0.5 or len(case.shares) == 1:
            here |= some
        if share == case.middle:
            here["mask-multiply"] = rivals.mask_multiply(stack)  # costs the same at every share
        for name in _executors(device, case.batch):
            here[name] = rivals.xdfast_stack(stack, name.rpartition(" ")[2] if device == "cuda" else "cpu")
        for name, way in here.items():
            if way is not None:
                timed[f"{name} @ {share:g}"] = _steps(way, x, gates)
        if device == "cuda":
            _add_graph(timed, f"{OURS} list @ {share:g}", f"{OURS} list", f" @ {share:g}")
    one = case.gates_at(case.middle, device)[0][..., None]
    pool = "none" if case.by_token else "meanmax"
    router = LayerRouter(x.shape[2], stack.num_layers, pool=pool).to(device, x.dtype).eval()
    timed["plan"] = lambda: stack.plan(x, one) and None
    timed["router"] = lambda: router(x)
    return timed


def _executors(device: str, batch: int) -> list[str]:
    if device != "cuda":
        return [OURS]
    return [f"{OURS} list", f"{OURS} planned", *([f"{OURS} graph", f"{OURS} switch"] if batch == 1 else [])]


def _steps(way: rivals.Gated, x: Tensor, gates: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        for one in gates:
            found = way(x, one)
        return found

    return run


def _add_graph(timed: dict[str, Callable[[], Any]], name: str, as_name: str, end: str = "") -> None:
    replay = graphed(timed[name])
    if replay is not None:
        timed[f"{as_name} graph{end}"] = replay


def check(case: RoutedCase, stack: RoutedStack, x: Tensor, timed: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Largest error of each candidate against float64, relative to the largest value: no speed of a wrong result.

    Dense ones with everything on, the others at the middle share.

    Raises:
        RuntimeError: one is off by more than its precision allows.
    """
    exact = copy.deepcopy(stack).double()
    masked, wide = rivals.mask_multiply(exact), x.double()
    errors = {}
    ones = torch.ones_like(case.gates_at(1.0, x.device.type)[-1])
    wanted = {name: ones for name in DENSE if name in timed}
    last = case.gates_at(case.middle, x.device.type)[-1]
    wanted |= {name: last for name in timed if name.endswith(f" @ {case.middle:g}")}
    truths: dict[int, Tensor] = {}
    for name, gates in wanted.items():
        if id(gates) not in truths:
            truths[id(gates)] = masked(wide, gates)
        truth = truths[id(gates)]
        errors[name] = float((timed[name]().double() - truth).abs().max() / truth.abs().max())
        if not errors[name] < _ALLOWED[case.dtype]:
            raise RuntimeError(f"{name} of {case} is off by {errors[name]:.1e} (largest error, relative)")
    return errors


def measure(case: RoutedCase, *, device: str = "cpu", budget: float = 20.0, compiled: bool = True) -> dict[str, Any]:
    """Everything known about one case.

    Args:
        case: stack, batch, gates.
        device: ``"cpu"`` or ``"cuda"``.
        budget: seconds for the timed rounds.
        compiled: also measure the dense stack under torch.compile.

    Returns:
        ``median_ms`` and ``p95_ms`` by candidate (a step of a path; of few rounds the latter is nearly the slowest), on CUDA
        ``work`` (launches and waits of a call), per share ``speedup`` of ours over each rival with quartiles of the
        rounds, ``fraction_of_ideal`` against eager, FLOPs; ``peak_mb``, ``error``, ``targets`` with what was reached.
    """
    if case.train:
        from .routed_train import measure_training

        return measure_training(case, device=device, budget=budget, compiled=compiled)
    stack, x = build(case, device).eval(), case.input(device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about code of the rivals
        timed = candidates(case, stack, x, compiled=compiled)
        errors = check(case, stack, x, timed)
        times = interleave(timed, budget=budget, rounds=(5, 60), device=device)
        looked_at = [n for n in timed if n in DENSE or n.endswith(f" @ {case.middle:g}")]
        own = [n for n in looked_at if " graph" not in n]  # a graph has its memory already
        memory = {name.partition(" @ ")[0]: peak_memory(timed[name], device) / 1e6 for name in own}
    steps = {f"{share:g}": len(case.gates_at(share)) for share in case.shares}
    times = {name: [t / steps.get(name.partition(" @ ")[2], 1) for t in samples] for name, samples in times.items()}
    result = {
        **describe(case, device, len(times["eager"])),
        "median_ms": {name: statistics.median(samples) * 1e3 for name, samples in times.items()},
        "p95_ms": {name: p95(samples) * 1e3 for name, samples in times.items()},
        "shares": [_at(case, stack, x, share, times) for share in case.shares],
        "peak_mb": memory,
        "error": errors,
    }
    if device == "cuda":
        with torch.no_grad():
            result["work"] = {
                name: host_work(timed[name], steps.get(name.partition(" @ ")[2], 1)) for name in looked_at
            }
    result["targets"] = targets(result)
    return result


def p95(samples: list[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(samples, n=20, method="inclusive")[-1]


def describe(case: RoutedCase, device: str, rounds: int) -> dict[str, Any]:
    """The case in plain values."""
    size = SIZES[case.size]
    about = {k: v for k, v in vars(case).items() if k != "shares"}
    more = {"tokens": size.tokens, "layers": size.layers, "device": device, "rounds": rounds}
    return {"case": str(case), **about, **more}


def _at(case: RoutedCase, stack: RoutedStack, x: Tensor, share: float, times: dict[str, list[float]]) -> dict[str, Any]:
    """What belongs to one share: the rivals' and our times, and FLOPs."""
    end = f" @ {share:g}"
    ours = {name: times[name] for name in times if name.startswith(OURS) and name.endswith(end)}
    best = min(ours, key=lambda name: statistics.median(ours[name]))
    others = {n: t for n, t in times.items() if n in DENSE or (n.endswith(end) and not n.startswith(OURS))}
    named = {name.removesuffix(end): samples for name, samples in {**others, best: times[best]}.items()}
    speedup = ratios(named, best.removesuffix(end))
    gates = case.gates_at(share, x.device.type)
    words = best.removesuffix(end).removeprefix(OURS).split()  # "xdfast list graph" is list, in a CUDA graph
    executor = words[0] if words else "cpu"
    counts = []
    for one in gates:
        plan = stack.plan(x, one[..., None])
        counts.append(count(stack, x.shape[1], plan, executor))
    flops = {key: sum(c[key] for c in counts) / len(counts) for key in counts[0]}
    ideal = flops["dense"] / flops["nominal"] if flops["nominal"] else math.inf
    return {
        "share": share,
        "realised": float(torch.stack([g.mean() for g in gates]).mean()),
        "ours": best.removesuffix(end),
        "median_ms": statistics.median(times[best]) * 1e3,
        "speedup": speedup,
        "ideal": ideal if math.isfinite(ideal) else None,
        "fraction_of_ideal": speedup["eager"]["ratio"] / ideal,
        "flops": flops,
    }


def count(stack: RoutedStack, tokens: int, plan: Any, executor: str) -> dict[str, float]:
    """FLOPs of a plan, in 10⁹."""
    found = count_routed(stack, tokens, plan, executor=executor)
    return {"dense": found.dense / 1e9, "nominal": found.nominal / 1e9, "executed": found.executed / 1e9}


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What this case promised: share, rival, the figure, the target, whether it is met; empty where nothing was."""
    if result["train"]:
        return []
    cpu = result["device"] == "cpu"
    if result["gates"] != ("path" if result["batch"] == 1 else "exact"):
        return []
    if cpu:
        wanted = MUST_REACH.get((result["size"], result["dtype"]), {}) if result["batch"] == 16 else {}
    else:
        wanted = CUDA_MUST_REACH.get((result["size"], result["batch"]), {}) if result["dtype"] == "bfloat16" else {}
    found = []
    for row in result["shares"]:
        figures = {name: entry["ratio"] for name, entry in row["speedup"].items()}
        figures["strongest dense"] = min(figures[name] for name in DENSE if name in figures)
        graphs = [figures[name] for name in DENSE if name.endswith(" graph") and name in figures]
        if graphs:
            figures["graphed dense"] = min(graphs)
        full = next((other for other in result["shares"] if other["share"] == 1), None)
        if full is not None:
            figures["all active"] = full["median_ms"] / row["median_ms"]
        for rival, least in wanted.get(row["share"], {}).items():
            if rival in figures:
                figure = figures[rival]
                found.append(
                    {"share": row["share"], "rival": rival, "figure": figure, "target": least, "met": figure >= least}
                )
    return found
