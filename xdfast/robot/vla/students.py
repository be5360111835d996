"""A student made of its teacher: the same weights, and a router that says which layers run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdfast.nn import (
    LayerRouter,
    RandomRouter,
    StaticRouter,
    block_influence,
    most_influential,
    route,
    routed_stacks,
)
from xdfast.nn.lora import add_lora
from xdfast.nn.router import check_finished
from xdfast.ops._checks import check_choice

__all__ = ["ROUTINGS", "derive_student", "rebuild_route", "route_facts"]

#: Who chooses the layers of a student: a router that learns, one fixed choice, or chance.
ROUTINGS = ("learned", "static", "random")


def derive_student(
    teacher: Any,
    target_flops: float = 0.5,
    *,
    routing: str = "learned",
    always_on: Sequence[int] = (0, -1),
    states: Sequence[Tensor] | None = None,
    lora: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A copy of a teacher whose layers are routed; ActDistill's student, or a baseline at the same FLOPs.

    Args:
        teacher: a :class:`xdfast.robot.vla.TeacherVLA`; left as it is.
        target_flops: r*, fraction of the layers' FLOPs.
        routing: ``"learned"``: a :class:`xdfast.nn.LayerRouter` over the teacher's groups of tokens, everything on at
            first. ``"static"``: the layers of the greatest block influence run, for every input. ``"random"``: as many, drawn
            for every input.
        always_on: layers that are never skipped.
        states: h₀ … h_L of the teacher on data: needed for ``"static"``; a learned router given them starts from the layers'
            influence (:meth:`xdfast.nn.LayerRouter.lean`) instead of even.
        lora: rank of adapters in the layers' linear maps, whose own weights are frozen; None: none.
        seed: of the router's weights, of the adapters', or of chance.
        options: further ones of :func:`xdfast.nn.route`; ``router`` takes those of a learned :class:`LayerRouter`.

    Raises:
        ValueError: an unknown routing, ``"static"`` without ``states``, a target out of reach, a teacher that is routed.
    """
    check_choice("routing", routing, ROUTINGS)
    if routed_stacks(teacher):
        raise ValueError("this VLA is routed already; a student is derived from its dense teacher")
    dim, layers = teacher.dim, teacher.num_layers
    router: Any = {"groups": [list(group) for group in teacher.groups.values()], **options.pop("router", {})}
    if routing == "static":
        if states is None:
            raise ValueError(
                "routing='static' chooses layers by their influence: pass states=hidden_states(...) on data"
            )
        router = StaticRouter(dim, layers, most_influential(block_influence(states), target_flops, always_on))
    elif routing == "random":
        router = RandomRouter(dim, layers, target_flops, always_on, seed)
    student = copy.deepcopy(teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if lora is not None:
            add_lora(student.layers, lora)
        if hasattr(student, "route"):  # a model that knows better than its list of layers how it is routed
            student = student.route(target_flops, always_on=always_on, router=router, copy=False, **options)
        else:
            options = {"blocks": "layers", "tokens": student.num_tokens, **options}
            student = route(student, target_flops, always_on=always_on, router=router, copy=False, **options)
    if routing == "learned" and states is not None:
        made: Any = routed_stacks(student)[0].router
        made.lean(block_influence(states))
    return student


def route_facts(vla: Any) -> dict[str, Any]:
    """What :func:`rebuild_route` needs to route the same model again; JSON-able.

    Raises:
        ValueError: a router of a class of yours, or one that still holds its budget batch by batch.
    """
    stack = routed_stacks(vla)[0]
    check_finished(stack.router)
    options = {**vla.xdfast_route.options, "gate": stack.gate.kind}  # a schedule may have changed it
    router = stack.router
    if type(router) is StaticRouter:
        options["router"] = {"kind": "static"}
    elif type(router) is RandomRouter:
        options["router"] = {"kind": "random", "target": router.target, "seed": router.seed}
    elif type(router) is not LayerRouter:
        raise ValueError(f"a {type(router).__name__} cannot be saved; xdfast's own routers can")
    return options


def rebuild_route(vla: Any, options: dict[str, Any]) -> Any:
    """Routes a dense model, in place, as the one was whose :func:`route_facts` are given."""
    options = dict(options)
    chosen = dict(options["router"])
    kind = chosen.pop("kind", "learned")
    layers = len(vla.get_submodule(options["blocks"]))
    if kind == "static":
        options["router"] = StaticRouter(vla.dim, layers)
    elif kind == "random":
        options["router"] = RandomRouter(vla.dim, layers, always_on=options["always_on"], **chosen)
    return route(vla, **options, copy=False, check=False)
