"""Measures the cross-correlation loss: ours by backend and precision, its rivals, and the floor, in one interleaved run."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import xdfast

from .cases import RSDCase
from .harness import interleave, peak_memory, ratios
from .rivals import bare_gradient, gemm_floor, lightly_style, literal

__all__ = ["BARE", "MUST_REACH", "OURS", "measure"]

OURS = "xdfast"
BARE = "autograd alone"
RIVALS = ("lightly-style", "lightly-style compiled", "literal", "literal compiled")

#: CPU, fp32, student gradient: (× lightly-style, × compiled lightly-style, bfloat16 products × lightly-style, × literal).
MUST_REACH = {
    (128, 768): (8, 5, 14, 50),
    (256, 1024): (6, 4, 12, 40),
    (128, 2048): (30, 17, 60, 190),
    (256, 4096): (50, 30, 100, 200),
    (512, 768): (2.5, 2, 5, 10),
    (1024, 768): (1.2, 1.1, 4, 4),
}

Loss = Callable[[Tensor, Tensor], Tensor]


def _ours(case: RSDCase, precision: str) -> Loss:
    # One gradient: the RSD loss. Both: Barlow Twins with the same factor, so that all candidates do the same work.
    eps_mode = "var" if case.both else "std"

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        result = xdfast.rsd_loss(student, teacher, eps_mode=eps_mode, precision=precision)
        assert isinstance(result, Tensor)
        return result

    return loss


def _graphed(step: Callable[[], None]) -> Callable[[], None] | None:
    """``step`` captured in a CUDA graph, or None if it cannot be captured (the literal loss synchronises)."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def candidates(
    case: RSDCase, student: Tensor, teacher: Tensor, *, compiled: bool = True
) -> tuple[dict[str, Callable[[], Any]], dict[str, Loss]]:
    """(what is timed by name, the losses behind it): forward and backward through autograd, and the floors."""
    device = student.device.type
    losses: dict[str, Loss] = {OURS: _ours(case, "float32"), f"{OURS} bf16": _ours(case, "bfloat16")}
    if device == "cuda":
        losses[f"{OURS} tf32"] = _ours(case, "tf32")
    losses |= {"lightly-style": lightly_style, "literal": literal}
    if compiled:
        torch._dynamo.reset()
        for name in ("lightly-style", "literal"):
            losses[f"{name} compiled"] = torch.compile(losses[name])
    wanted = [student, teacher] if case.both else [student]

    def step(loss: Loss) -> Callable[[], None]:
        return lambda: torch.autograd.grad(loss(student, teacher), wanted) and None

    def forced(name: str, loss: Loss) -> Callable[[], None]:
        def run() -> None:
            with xdfast.backend(name):
                torch.autograd.grad(loss(student, teacher), wanted)

        return run

    timed: dict[str, Callable[[], Any]] = {name: step(loss) for name, loss in losses.items()}
    timed[f"{OURS} plain torch"] = forced("torch", losses[OURS])
    if device == "cuda":
        timed[f"{OURS} triton"] = forced("triton", losses[OURS])
        timed[f"{OURS} triton bf16"] = forced("triton", losses[f"{OURS} bf16"])
        for name in list(timed):
            graph = _graphed(timed[name])
            if graph is None and name.startswith(OURS):  # that is promised; only a rival may fail to
                raise RuntimeError(f"{name} at {case} cannot be captured in a CUDA graph")
            if graph is not None:
                timed[f"{name} graph"] = graph
    elif "cpp" in [r.backend for r in xdfast.ops.explain(["cpu"])[0].rungs if r.available]:
        a, b = student.detach(), teacher.detach()
        timed[f"{OURS} op alone"] = lambda: torch.ops.xdfast_c.rsd_loss(
            a, b, 0.01, 1e-5, case.both, False, 1.0, True, case.both, None, None
        )
    timed[BARE] = bare_gradient(wanted)
    for name, dtype in (("floor", torch.float32), ("floor bf16", torch.bfloat16)):
        a, b = student.detach().to(dtype), teacher.detach().to(dtype)
        small, large = a.new_empty(min(a.shape), min(a.shape)), torch.empty_like(a)
        timed[name] = lambda a=a, b=b, small=small, large=large: gemm_floor(a, b, small, large)
    return timed, losses


def check(case: RSDCase, losses: dict[str, Loss], student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Relative gradient error of each loss against float64: no speed of a wrong result.

    Raises:
        RuntimeError: one is off by more than its precision allows.
    """
    wanted = [student, teacher] if case.both else [student]
    errors = {}
    exact = {}
    for name, definition in (("std", literal), ("var", lightly_style)):
        s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
        exact[name] = torch.autograd.grad(definition(s, t), [s, t][: len(wanted)])
    for name, loss in losses.items():
        # The two definitions differ in where ε goes; each is compared with its own.
        truth = exact["var" if "lightly" in name or (case.both and name.startswith(OURS)) else "std"]
        found = torch.autograd.grad(loss(student, teacher), wanted)
        errors[name] = max(float((f.double() - w).norm() / w.norm()) for f, w in zip(found, truth, strict=True))
        half = student.dtype in (torch.float16, torch.bfloat16) or "bf16" in name or "tf32" in name
        if not errors[name] < (2e-2 if half else 2e-5):
            raise RuntimeError(f"{name} at {case} is off by {errors[name]:.1e} (relative gradient error)")
    return errors


def measure(
    case: RSDCase,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    budget: float = 20.0,
    compiled: bool = True,
) -> dict[str, Any]:
    """Everything known about one case.

    Args:
        case: shape and gradients.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the inputs.
        budget: seconds for the timed rounds.
        compiled: also measure the rivals under torch.compile.

    Returns:
        ``median_ms`` by candidate, ``speedup`` of ours over each (with quartiles of the rounds), ``times_floor``,
        ``limit`` (one gradient: the ratio over each rival of a loss that costs its products and autograd, and nothing else),
        ``gflops_per_s`` and ``gbytes_per_s`` of ours, ``peak_mb`` by candidate, ``gradient_error`` by candidate,
        ``backend`` that ours ran.
    """
    student, teacher = case.inputs(dtype, device)
    timed, losses = candidates(case, student, teacher, compiled=compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about code of the rivals
        errors = check(case, losses, student, teacher)
        times = interleave(timed, budget=budget, rounds=(3, 60), device=device)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    memory = {
        name: peak_memory(timed[name], device) / 1e6 for name in timed if not name.startswith("floor") and name != BARE
    }
    chosen = next(r.backend for r in xdfast.ops.explain([device])[0].rungs if r.chosen)
    return {
        "n": case.n,
        "d": case.d,
        "both": case.both,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": chosen,
        "rounds": len(times[OURS]),
        "median_ms": {name: value * 1e3 for name, value in medians.items()},
        "speedup": ratios(times, OURS),
        "times_floor": {name: medians[name] / medians["floor"] for name in medians if name.startswith(OURS)},
        "limit": {}
        if case.both
        else {n: medians[n] / (medians["floor"] + medians[BARE]) for n in RIVALS if n in medians},
        "gflop": case.flops / 1e9,
        "gflops_per_s": case.flops / medians[OURS] / 1e9,
        "gbytes_per_s": case.bytes(student.element_size()) / medians[OURS] / 1e9,
        "peak_mb": memory,
        "gradient_error": errors,
    }
