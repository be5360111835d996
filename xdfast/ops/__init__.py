"""Functions on tensors: maths, checks, schema, fake kernel, autograd, choice of backend.

Only this room registers ops, validates tensors and chooses backends.
"""

from __future__ import annotations

from xdfast.ops._backends import backend, explain
from xdfast.ops.route import RouteList, RoutePlan, make_plan
from xdfast.ops.routed import (
    routed_attention,
    routed_linear_residual,
    routed_linear_residual_,
    routed_ln_linear,
    routed_norm,
    routed_residual,
    routed_residual_,
)
from xdfast.ops.rsd import prepare_teacher, rsd_loss

__all__ = [
    "RouteList",
    "RoutePlan",
    "backend",
    "explain",
    "make_plan",
    "prepare_teacher",
    "routed_attention",
    "routed_linear_residual",
    "routed_linear_residual_",
    "routed_ln_linear",
    "routed_norm",
    "routed_residual",
    "routed_residual_",
    "rsd_loss",
]
