"""One case of the sweep: an op or loss, its inputs, an independent formulation in float64, and what every case must fulfil."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tolerances import TOLERANCES
from torch import Tensor

Tensors = dict[str, Tensor]

#: 1, 2, primes, powers of two and their neighbours.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65)
SMALL = (1, 2, 3, 4, 5, 7, 8, 9)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset")
DEGENERATE = ("zeros", "equal samples", "equal columns", "same as the other", "1e4", "1e-30")


@dataclass
class Case:
    """What is tried.

    Attributes:
        run: ours, given the tensors by name.
        truth: the same quantity from the equation, in float64 and plain torch.
        tensors: inputs; floating ones are float64 and of size about 1, and take the dtype and layout that is tried.
        learning: those that get a gradient.
        detached: those that must get none even if they ask for it.
        kind: which tolerances: "value" with "gradient", or "routed".
        scale: size of the summands of the result: cancelling ones leave an error of that size.
        grad_scale: the same for gradients; None: ``scale``.
        same: (what, a pair of tensors that must agree in float64), evaluated when asked for.
        well: whether single precision can be compared: False where the equation itself is ill-conditioned.
        small: small and smooth enough for finite differences.
        degenerate: whether inputs that are all zero, equal or of extreme size must give finite results.
        exclude: degenerate inputs that the equation does not allow.
    """

    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    tensors: Tensors
    learning: tuple[str, ...]
    detached: tuple[str, ...] = ()
    kind: str = "value"
    scale: float = 1.0
    grad_scale: float | None = None
    same: list[tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = field(default_factory=list)
    well: bool = True
    small: bool = False
    degenerate: bool = True
    exclude: Sequence[str] = ()


def random(seed: int, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Normal numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides: of a transposed copy, every second column of a wider one, or inside another storage."""
    if layout == "contiguous" or x.dim() < 2:
        return x.clone()
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    room = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype)
    room[3:] = x.flatten()
    return room[3:].view(x.shape)


def evaluate(run: Callable[..., Tensor], tensors: Tensors, learning: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """(result, gradients of its sum weighted at random), None as zeros."""
    given = {
        name: t.detach().requires_grad_() if name in learning and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    out = run(**given)
    direction = random(99, *out.shape).to(out.dtype) if out.dim() else torch.ones_like(out)
    wanted = [given[name] for name in learning]
    grads = (
        torch.autograd.grad(out, wanted, direction, allow_unused=True) if out.requires_grad else [None] * len(wanted)
    )
    return out.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def converted(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def check_truth(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Value and gradients are finite, and those of the equation within tests/tolerances.py."""
    rounded = converted(case.tensors, dtype)
    value, grads = evaluate(case.run, {n: arranged(t, layout) for n, t in rounded.items()}, case.learning)
    exact = converted(rounded, torch.float64)
    wanted, wanted_grads = evaluate(case.truth, exact, case.learning)
    assert value.isfinite().all(), f"{dtype} {layout}: {value}"
    assert value.shape == wanted.shape
    for name, g in zip(case.learning, grads, strict=True):
        assert g.dtype == rounded[name].dtype and g.shape == rounded[name].shape
        assert g.isfinite().all(), f"{dtype} {layout}: gradient of {name}"
    if dtype != torch.float64 and not case.well:
        return
    # How far rounding the inputs alone moves the result: what no arithmetic of that precision can do better than.
    unit = 1.2e-7 if dtype != torch.float64 else 2.3e-16
    moved_value, moved = torch.zeros(()), [torch.zeros(()) for _ in grads]
    for turn in range(2):
        nudged = {
            n: t * (1 + unit * random(7 + turn, *t.shape).sign()) if t.is_floating_point() else t
            for n, t in exact.items()
        }
        v, gs = evaluate(case.truth, nudged, case.learning)
        moved_value = torch.maximum(moved_value, (v - wanted).norm())
        moved = [torch.maximum(m, (g - w).norm()) for m, g, w in zip(moved, gs, wanted_grads, strict=True)]
    value_promise, grad_promise = _promises(case.kind, dtype)
    error, limit = (
        (value.double() - wanted).norm(),
        value_promise * torch.clamp(wanted.norm(), min=case.scale) + 8 * moved_value,
    )
    assert error <= limit, f"{dtype} {layout}: value off by {error:.3g}, allowed {limit:.3g}, true {wanted.norm():.6g}"
    least = case.scale if case.grad_scale is None else case.grad_scale
    for name, g, w, m in zip(case.learning, grads, wanted_grads, moved, strict=True):
        error, limit = (g.double() - w).norm(), grad_promise * torch.clamp(w.norm(), min=least) + 8 * m
        # a gradient below half precision's smallest number is 0
        limit += torch.finfo(dtype).smallest_normal * g.numel() ** 0.5
        assert error <= limit, (
            f"{dtype} {layout}: gradient of {name} off by {error:.3g}, allowed {limit:.3g}, true {w.norm():.6g}"
        )


def _promises(kind: str, dtype: torch.dtype) -> tuple[float, float]:
    if kind == "routed":
        return 4 * TOLERANCES["routed", dtype], 8 * TOLERANCES["routed", dtype]
    gradient = TOLERANCES["gradient", dtype]
    if dtype in (torch.bfloat16, torch.float16):
        gradient += 5 * TOLERANCES["gradient", torch.float32]
    return 5 * TOLERANCES["value", dtype], gradient if dtype != torch.float32 else 2 * gradient


def check_same(case: Case) -> list[str]:
    """What the maths promises, in float64; returns what was looked at."""
    for what, pair in case.same:
        a, b = (x.detach().double() for x in pair())
        assert a.shape == b.shape and (a - b).norm() <= 1e-9 * max(float(b.norm()), case.scale), (
            f"{what}: {a.flatten()[:4]} and {b.flatten()[:4]}"
        )
    return [what for what, _ in case.same]


def check_expanded(case: Case) -> None:
    """A tensor of stride 0 is read as its copy."""
    for name in case.tensors:
        t = case.tensors[name]
        if not t.is_floating_point() or t.dim() < 2:
            continue
        stretched = t[..., :1].expand_as(t)
        results = [case.run(**{**case.tensors, name: x}).detach() for x in (stretched, stretched.contiguous())]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9 * case.scale, equal_nan=True)


def check_detached(case: Case) -> None:
    """A teacher that asks for a gradient changes nothing for the student; a detached one gets none."""
    _, alone = evaluate(case.run, case.tensors, case.learning)
    given = {
        n: t.clone().requires_grad_() if n in (*case.learning, *case.detached) else t for n, t in case.tensors.items()
    }
    out = case.run(**given)
    if out.requires_grad:
        out.sum().backward() if out.dim() == 0 else out.backward(random(99, *out.shape).to(out.dtype))
    for name in case.detached:
        assert given[name].grad is None or not given[name].grad.any(), f"{name} got a gradient"
    for name, g in zip(case.learning, alone, strict=True):
        ours = torch.zeros_like(g) if given[name].grad is None else given[name].grad
        torch.testing.assert_close(ours, g, rtol=1e-10, atol=1e-12)


def check_gradcheck(case: Case) -> bool:
    """Finite differences, on small smooth cases; says whether it was one."""
    leaves = [case.tensors[name].clone().requires_grad_() for name in case.learning]
    if not case.small or sum(t.numel() for t in leaves) > 40:
        return False
    fixed = {n: t for n, t in case.tensors.items() if n not in case.learning}
    torch.autograd.gradcheck(
        lambda *given: case.run(**fixed, **dict(zip(case.learning, given, strict=True))), leaves, atol=1e-4, rtol=1e-3
    )
    return True


def check_degenerate(case: Case, what: str, dtype: torch.dtype) -> None:
    """Finite input, however poor, has a finite result and finite gradients."""
    if not case.degenerate or what in case.exclude:
        return
    changed = {}
    first: Tensor | None = None
    for name, t in converted(case.tensors, dtype).items():
        if t.is_floating_point() and t.dim() >= 2:
            if what == "zeros":
                t = torch.zeros_like(t)
            elif what == "equal samples":
                t = t[:1].expand_as(t).clone()
            elif what == "equal columns":
                t = t[..., :1].expand_as(t).clone()
            elif what == "same as the other" and first is not None and first.shape == t.shape:
                t = first.clone()
            elif what == "1e4":
                t = t * 1e4
            elif what == "1e-30":
                t = t * 1e-30
            first = t if first is None else first
        changed[name] = t
    value, grads = evaluate(case.run, changed, case.learning)
    assert value.isfinite().all(), f"{what}, {dtype}: {value}"
    for name, g in zip(case.learning, grads, strict=True):
        assert g.isfinite().all(), f"{what}, {dtype}: gradient of {name}"
