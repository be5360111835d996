"""Bad input for every case of the sweep: one tensor made wrong in one way, and what the error must say."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hardening_cases import Case
from torch import Tensor

import xdfast

_HOME = str(Path(xdfast.__file__).parent)


#: How an error of the compiled extension begins; its last Python frame is torch's.
_NATIVE = re.compile(
    r"(attention|gather|gather_norm|scatter_add_|norm_backward_|row_dots|swiglu|route_plan_|rsd_loss|rsd_prepare): "
)


def _shape(x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """The tensor, and what a message may call its shape: all of it, or without the axis that is not compared."""
    return x, tuple(str(list(part)) for part in (x.shape, x.shape[1:], x.shape[:-1]))


def _fewer(x: Tensor, size: int) -> tuple[Tensor, tuple[str, ...]]:
    return x, (*_shape(x)[1], f" {size} ", f" {size};", f" {size}]", f" {size},", f"[{size}")


#: name → (the tensor made wrong, or None where that cannot be done to it; any of what the message must name).
WRONG: dict[str, Callable[[Tensor], tuple[Any, tuple[str, ...]] | None]] = {
    "whole numbers": lambda t: (t.long(), ("int64",)) if t.is_floating_point() else (t.double(), ("float64",)),
    "complex": lambda t: (t.to(torch.complex64), ("complex64",)),
    "bool": lambda t: (t > 0, ("bool",)),
    "a list": lambda t: (t.tolist(), ("list",)),
    "nothing": lambda t: (None, ("NoneType",)),
    "three dimensions more": lambda t: _shape(t[None, None, None]),
    "flat": lambda t: _shape(t.flatten()) if t.dim() > 1 else None,
    "a sample less": lambda t: _fewer(t[:-1], len(t) - 1) if len(t) > 1 else None,
    "no sample": lambda t: _fewer(t[:0], 0) if len(t) else None,
    "a feature less": lambda t: _fewer(t[..., :-1], t.shape[-1] - 1) if t.dim() > 1 and t.shape[-1] > 1 else None,
    "another device": lambda t: (t.to("meta"), ("meta",)),
    "NaN": lambda t: (_planted(t, float("nan")), ()) if t.is_floating_point() and t.numel() else None,
    "infinity": lambda t: (_planted(t, float("inf")), ()) if t.is_floating_point() and t.numel() else None,
}

#: Tensors that may be left out.
OPTIONAL = frozenset({"bias", "edge_scores", "probabilities"})

#: (subject, tensor, what) that is no mistake, with the reason. "*" stands for any.
ALLOWED: dict[tuple[str, str, str], str] = {
    ("rkd", "*", "a feature less"): "student and teacher may have different widths",
    ("BudgetLoss", "gates", "a sample less"): "any number of units, if no probabilities come with them",
    ("BudgetLoss", "gates", "a feature less"): "any number of branches, if there are no costs",
    ("BudgetLoss", "gates", "another device"): "one tensor alone is at home anywhere",
    ("BudgetLoss", "gates", "infinity"): "gates of layers that are always on are not looked at",
    ("stage1_loss", "actions", "a sample less"): "its first dimension is layers, of which there may be any number",
    ("make_plan", "gates", "a sample less"): "any number of units that samples divide",
    ("make_plan", "gates", "a feature less"): "any number of branches",
    ("make_plan", "gates", "another device"): "one tensor alone is at home anywhere; the case itself reads its values",
    **{
        (op, tensor, what): "a row that is not listed, or has no weight, is not looked at"
        for op in (
            "routed_ln_linear",
            "routed_norm",
            "routed_linear_residual",
            "routed_linear_residual_",
            "routed_residual",
            "routed_residual_",
            "routed_attention",
            "knn_graph",
            "edge_affinity",
            "graph_attention",
        )
        for tensor in ("*",)
        for what in ("NaN", "infinity")
    },
    ("routed_ln_linear", "weight", "a sample less"): "any number of features, if there is no bias",
    ("routed_ln_linear", "weight", "no sample"): "no feature at all is a width, if there is no bias",
    ("routed_norm", "x", "a feature less"): "any width, if the norm has no weight",
    ("routed_linear_residual", "weight", "nothing"): "is routed_residual",
    ("routed_linear_residual_", "weight", "nothing"): "is routed_residual_",
    ("graph_attention", "values", "a feature less"): "values may have any width",
}


def _planted(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[0] = value
    return t


def allowed(subject: str, tensor: str, what: str) -> bool:
    return any((s, t, w) in ALLOWED for s in (subject, "*") for t in (tensor, "*") for w in (what, "*")) or (
        what == "nothing" and tensor in OPTIONAL
    )


def outcome(subject: str, case: Case, tensor: str, what: str) -> str | None:
    """ "refused", "carried on" (a result that is no number) or "allowed"; None where it cannot be tried.

    Raises:
        AssertionError: a number came out, the error is not ours, or it does not name what is wrong.
    """
    made = WRONG[what](case.tensors[tensor])
    if made is None:
        return None
    value, named = made
    given = {name: t.clone() for name, t in case.tensors.items()} | {tensor: value}
    where = f"{subject}: {tensor} with {what}, shapes { {n: list(t.shape) for n, t in case.tensors.items()} }"
    try:
        result = case.run(**given)
    except (ValueError, TypeError, RuntimeError) as error:
        if allowed(subject, tensor, what):
            return "allowed"
        text = str(error)
        frames = traceback.extract_tb(error.__traceback__)
        ours = frames[-1].filename.startswith(_HOME) or _NATIVE.match(text)
        assert ours, f"{where}: not our error, but {type(error).__name__}: {text}"
        assert not named or any(name in text for name in named), f"{where}: does not name {named[0]!r}: {text}"
        return "refused"
    if what in ("NaN", "infinity") and not bool(result.isfinite().all()):
        return "carried on"
    assert allowed(subject, tensor, what), f"{where}: no error, but {result.flatten()[:3]}"
    return "allowed"
