"""Cases of every public op: inputs by hypothesis, the equation in float64 and plain torch, and what its maths promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hardening_cases import SIZES, SMALL, Case, random
from hardening_losses import _permuted, _size, _with, correlation_loss, rsd, seeds, vicreg
from hypothesis import strategies as st
from routed_parts import activated, normalised, route_of, row_mask
from torch import Tensor
from torch.nn import functional as F

import xdfast
from xdfast.ops import (
    make_plan,
    prepare_teacher,
    routed_attention,
    routed_linear_residual,
    routed_linear_residual_,
    routed_ln_linear,
    routed_norm,
    routed_residual,
    routed_residual_,
    rsd_loss,
)
from xdfast.ops.covariance import vicreg_loss
from xdfast.ops.graph import edge_affinity, graph_attention, knn_graph
from xdfast.ops.routed import ACTIVATIONS, NORMS
from xdfast.ops.rsd import rsd_loss_distributed

#: torch.ops.xdfast.NAME → the case whose forward and backward run it.
REGISTERED = {
    "rsd_loss": "rsd_loss",
    "rsd_prepare": "prepare_teacher",
    "rsd_loss_distributed": "tests/ops/test_rsd_distributed.py: several processes",
    "variance_covariance": "vicreg_loss",
    "route_plan_": "make_plan",
    "routed_attention": "routed_attention",
    "routed_attention_backward": "routed_attention",
    "routed_ln_linear": "routed_ln_linear",
    "routed_ln_linear_backward": "routed_ln_linear",
    "routed_linear_residual": "routed_linear_residual",
    "routed_linear_residual_": "routed_linear_residual_",
    "routed_linear_residual_backward": "routed_linear_residual",
}


def _rsd_op(draw, call: Callable, backends: tuple[str | None, ...]) -> Case:
    """Functions of the cross-correlation loss, under every backend, with batch norm's place for ε too."""
    case = rsd(draw)
    kappa, mode, weight = draw(st.sampled_from([0.01, 0.0, 1.0])), draw(st.sampled_from(["std", "var"])), 0.7
    backend, d = draw(st.sampled_from(backends)), case.tensors["student"].shape[1]

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        with xdfast.backend(backend):
            return call(student, teacher, kappa=kappa, eps_mode=mode, weight=weight)

    old, case.run = case.scale, run
    case.truth = lambda student, teacher: weight * correlation_loss(student, teacher, kappa, 1e-5, mode)
    case.scale = weight * (d + kappa * d * d)
    case.grad_scale *= case.scale / old
    s, t = case.tensors["student"], case.tensors["teacher"]
    case.same = [
        ("permutation of samples", _permuted(case, ("student", "teacher"), 3)),
        ("shift of columns", _with(case, student=s + 2, teacher=t - random(1, d))),
    ]
    return case


def rsd_op(draw) -> Case:
    return _rsd_op(draw, rsd_loss, (None, "torch", "reference"))


def rsd_distributed(draw) -> Case:
    """One process, which is its own group."""
    return _rsd_op(draw, rsd_loss_distributed, (None,))


def prepared(draw) -> Case:
    def call(student: Tensor, teacher: Tensor, *, kappa: float, eps_mode: str, weight: float) -> Tensor:
        return rsd_loss(
            student, prepare_teacher(teacher, eps_mode=eps_mode), kappa=kappa, eps_mode=eps_mode, weight=weight
        )

    case = _rsd_op(draw, call, (None, "torch"))
    case.learning, case.detached = ("student",), ("teacher",)
    return case


def vicreg_op(draw) -> Case:
    case, names = vicreg(draw), ("z_a", "z_b")
    lam, mu, nu = 3.0, 2.0, 0.5
    case.run = lambda z_a, z_b: vicreg_loss(z_a, z_b, lambda_param=lam, mu_param=mu, nu_param=nu, eps=1e-3)

    def truth(z_a: Tensor, z_b: Tensor) -> Tensor:
        total = lam * (z_a - z_b).square().mean()
        for z in (z_a, z_b):
            c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
            total = total + mu / 2 * (1 - (c.diagonal() + 1e-3).sqrt()).clamp(min=0).mean()
            total = total + nu * (c - torch.diag(c.diagonal())).square().sum() / len(c)
        return total

    norms = sum(float(torch.cov(case.tensors[name].T).square().sum()) for name in names)
    case.truth, case.small = truth, False
    case.scale = lam + mu + nu * norms / case.tensors["z_a"].shape[1]
    case.grad_scale = case.scale
    case.same = [("permutation of samples", _permuted(case, names, 5))]
    return case


# --- plans ------------------------------------------------------------------------------------------------------------


def plan(draw) -> Case:
    """All numbers of a plan in one row, against their definition."""
    samples, per_sample = _size(draw, SMALL), _size(draw, (1, 2, 3))
    layers, branches, rows = _size(draw, (1, 2, 3, 5)), draw(st.integers(1, 2)), _size(draw, SMALL)
    threshold, hard, seed = draw(st.sampled_from([0.5, 0.0, 0.3])), draw(st.booleans()), draw(seeds)
    forced, backend = draw(st.booleans()), draw(st.sampled_from([None, "torch"]))
    units = samples * per_sample
    # fractions that bfloat16 holds: deciding by a threshold is no equation that rounding may move
    gates = (torch.special.ndtr(random(seed, units, layers, branches)) * 64).round() / 64
    force = random(seed + 1, units, layers, branches) > 1 if forced else None

    def run(gates: Tensor) -> Tensor:
        with xdfast.backend(backend):
            plan = make_plan(gates, rows_per_unit=rows, samples=samples, threshold=threshold, hard=hard, force=force)
        lists = []
        for layer in range(layers):
            for branch in range(branches):
                route = plan.of(layer, branch)
                n = int(route.count)
                lists += [route.index[:n], torch.full((units - n,), -1), route.count, route.offsets]
        # where gates learn they are the multipliers themselves; those of units that are not listed mean nothing
        on = (gates.permute(1, 2, 0) > threshold) | (False if force is None else force.permute(1, 2, 0))
        return torch.cat([torch.where(on, plan.gate.double(), 0.0).flatten(), *(x.double() for x in lists)])

    def truth(gates: Tensor) -> Tensor:
        lists = []
        on = gates > threshold
        listed = on if force is None else on | force
        for layer in range(layers):
            for branch in range(branches):
                ids = [u for u in range(units) if listed[u, layer, branch]]
                ends = [sum(u // per_sample <= b for u in ids) * rows for b in range(samples)]
                lists += [*ids, *[-1] * (units - len(ids)), len(ids), 0, *ends]
        learns = gates.requires_grad
        gate = gates if learns or not hard else on.double()
        gate = torch.where(listed, gate, 0.0).permute(1, 2, 0).flatten()
        return torch.cat([gate, torch.tensor(lists, dtype=torch.float64)])

    return Case(run, truth, {"gates": gates}, ("gates",), kind="routed", exclude=("1e4",))


# --- routed branches --------------------------------------------------------------------------------------------------


def _branch(draw):
    units, rows, width = _size(draw, SMALL), _size(draw, SMALL), _size(draw, least=2, most=33)
    seed = draw(seeds)
    active = (random(seed, units) > draw(st.sampled_from([0.0, -9.0, 9.0]))).tolist()
    gate = torch.special.ndtr(random(seed + 1, units)) if draw(st.booleans()) else None
    route = route_of(active, rows, gate=gate, known=draw(st.booleans()))
    if gate is not None:  # multipliers are float32, as a plan holds them
        route = route.__class__(gate.float(), route.index, route.count, route.offsets, rows, route.units)
    return units * rows, rows, width, seed, route, draw(st.sampled_from([None, "torch"]))


def _compact(full: Tensor, route) -> Tensor:
    """Listed rows, as the op returns them, with zeros in what means nothing."""
    listed = full[row_mask(route)]
    room = route.capacity - len(listed)
    return F.pad(listed, (0, 0, 0, room))


def _meant(h: Tensor, route) -> Tensor:
    keep = torch.arange(len(h)) < int(route.count) * route.rows_per_unit
    return torch.where(keep[:, None], h, 0)


def ln_linear(draw, linear: bool = True) -> Case:
    total, _, width, seed, route, backend = _branch(draw)
    norm, act, affine = draw(st.sampled_from(NORMS)), draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
    act = act if linear else "none"
    features, eps = _size(draw, SMALL), draw(st.sampled_from([1e-6, 1e-3]))
    x = random(seed + 2, total, width, shift=0.5)
    tensors: dict[str, Tensor] = {"x": x}
    if linear:
        tensors["weight"] = random(seed + 3, features * (2 if act == "swiglu" else 1), width, scale=width**-0.5)
        if affine:
            tensors["bias"] = random(seed + 4, len(tensors["weight"]))
    single: dict[str, Tensor] = {}
    if affine and norm != "none":
        single["norm_weight"] = random(seed + 5, width, shift=1).float()
        if norm == "layer":
            single["norm_bias"] = random(seed + 6, width).float()

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with xdfast.backend(backend):
            if not linear:
                return _meant(routed_norm(x, route, **single, norm=norm, eps=eps), route)
            return _meant(routed_ln_linear(x, weight, bias, route, **single, norm=norm, eps=eps, act=act), route)

    def truth(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        nw, nb = (None if single.get(n) is None else single[n].double() for n in ("norm_weight", "norm_bias"))
        y = normalised(x, nw, nb, norm, eps)
        return _compact(activated(F.linear(y, weight, bias), act) if linear else y, route)

    least = float((x - x.mean(1, keepdim=True)).square().mean(1).sqrt().min()) if norm == "layer" else 1.0
    case = Case(run, truth, tensors, tuple(tensors), kind="routed", scale=math.sqrt(total) + 1, well=least > 0.2)
    case.grad_scale = case.scale * (1 + 1 / max(least, 1e-3))
    case.exclude = ("1e4",) if norm == "none" else ()
    if norm == "layer" and least > 0.1 and not affine and not linear:
        sharp = lambda x: _meant(routed_norm(x, route, norm="layer", eps=1e-14), route)  # noqa: E731
        case.same = [("shift and scale of a row", lambda: (sharp(3 * x + 5), sharp(x)))]
    untouched = x.clone()
    untouched[~row_mask(route)] = 1e3  # nobody reads what is not listed
    case.same.append(("rows that are not listed", _with(case, x=untouched)))
    return case


def residual(draw, linear: bool = True, in_place: bool = False) -> Case:
    total, _, width, seed, route, backend = _branch(draw)
    inner = _size(draw, SIZES, most=33) if linear else width
    tensors = {"x": random(seed + 2, total, width), "h": random(seed + 3, route.capacity, inner)}
    if linear:
        tensors["weight"] = random(seed + 4, width, inner, scale=inner**-0.5)
        if draw(st.booleans()):
            tensors["bias"] = random(seed + 5, width)
    mask = row_mask(route)

    def run(x: Tensor, h: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with xdfast.backend(backend):
            if in_place:
                out = x.detach().clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
                with torch.no_grad():
                    return (
                        routed_linear_residual_(out, h, weight, bias, route)
                        if linear
                        else routed_residual_(out, h, route)
                    )
            return routed_linear_residual(x, h, weight, bias, route) if linear else routed_residual(x, h, route)

    def truth(x: Tensor, h: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        y = F.linear(h, weight, bias) if linear else h
        rows = mask.nonzero()[:, 0]
        y = y[: len(rows)]
        if route.gate is not None:
            y = y * route.gate.double()[rows // route.rows_per_unit, None]
        return torch.cat([x[r : r + 1] + (y[i : i + 1] if (i := _place(rows, r)) >= 0 else 0) for r in range(total)])

    learning = () if in_place else tuple(tensors)
    case = Case(run, truth, tensors, learning, kind="routed", scale=math.sqrt(total))
    if not mask.any() or not mask.all():
        case.same = [("rows that are not listed", lambda: (run(**tensors)[~mask], tensors["x"][~mask]))]
    return case


def _place(rows: Tensor, row: int) -> int:
    found = (rows == row).nonzero()
    return int(found[0]) if len(found) else -1


def attention(draw) -> Case:
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 17, 33]), min_size=1, max_size=4))
    kv, groups, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), _size(draw, (1, 2, 3, 4, 7, 8, 16, 17))
    causal, seed, backend = draw(st.booleans()), draw(seeds), draw(st.sampled_from([None, "torch"]))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = sum(lengths)
    q, k, v = (random(seed + i, total, heads, width) for i, heads in enumerate((kv * groups, kv, kv)))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with xdfast.backend(backend):
            return routed_attention(q, k, v, offsets, causal=causal)

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = [q[:0]]
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            heads = []
            for h in range(kv * groups):
                scores = q[begin:end, h] @ k[begin:end, h // groups].T / math.sqrt(width)
                if causal:
                    scores = scores + torch.full_like(scores, -math.inf).triu(1)
                heads.append(scores.softmax(-1) @ v[begin:end, h // groups])
            out.append(torch.stack(heads, 1))
        return torch.cat(out)

    case = Case(
        run,
        truth,
        {"q": q, "k": k, "v": v},
        ("q", "k", "v"),
        kind="routed",
        scale=math.sqrt(total) + 1,
        exclude=("1e4",),
    )
    case.same = [
        ("shift of all keys", _with(case, k=k + random(seed + 5, 1, kv, width))),
        ("values of one", lambda: (run(q, k, torch.ones_like(v)), torch.ones_like(q))),
    ]
    return case


# --- graphs -----------------------------------------------------------------------------------------------------------


def _tokens(draw) -> tuple[int, int, int, int]:
    return _size(draw, (1, 2, 3)), _size(draw, (1, 2, 3, 7, 8, 9, 17)), _size(draw, SMALL), draw(seeds)


def knn(draw) -> Case:
    samples, tokens, width, seed = _tokens(draw)
    k, loops, masked = _size(draw, (1, 2, 3, 8)), draw(st.booleans()), draw(st.booleans())
    # whole numbers of few digits: the order of affinities is the same in every precision
    q, keys = ((random(seed + i, samples, tokens, width) * 4).round() for i in range(2))
    tie = torch.arange(tokens, dtype=torch.float64) / 64
    q, keys = F.pad(q, (0, 1), value=1.0), torch.cat((keys, tie.expand(samples, tokens)[..., None]), -1)
    mask = random(seed + 2, samples, tokens) > -0.7 if masked else None

    def run(queries: Tensor, keys: Tensor) -> Tensor:
        return knn_graph(queries, keys, k, mask, self_loops=loops).double() * (1 if mask is None else mask[..., None])

    def truth(queries: Tensor, keys: Tensor) -> Tensor:
        found = torch.full((samples, tokens, k), -1.0, dtype=torch.float64)
        for b in range(samples):
            real = [j for j in range(tokens) if mask is None or mask[b, j]]
            for i in range(tokens):
                others = [j for j in real if loops or j != i] or [j for j in real if j == i]
                others.sort(key=lambda j: -float(queries[b, i] @ keys[b, j]))
                for place, j in enumerate(others[:k]):
                    found[b, i, place] = j
        return found * (1 if mask is None else mask[..., None])

    case = Case(run, truth, {"queries": q, "keys": keys}, (), kind="routed")
    case.same = [("scale of queries", _with(case, queries=q * 4))]
    if mask is not None:
        hole = lambda x: torch.where(mask[..., None], x, math.nan)  # noqa: E731
        case.same.append(("what padding holds", _with(case, queries=hole(q), keys=hole(keys))))
    return case


def affinity(draw) -> Case:
    samples, tokens, width, seed = _tokens(draw)
    k = _size(draw, (1, 2, 3, 8))
    neighbours = torch.randint(-1, tokens, (samples, tokens, k), generator=torch.Generator().manual_seed(seed))
    q, keys = random(seed, samples, tokens, width), random(seed + 1, samples, tokens, width)

    def truth(queries: Tensor, keys: Tensor) -> Tensor:
        rows = torch.arange(samples)[:, None, None]
        dots = (queries[:, :, None] * keys[rows, neighbours.clamp(min=0)]).sum(-1)
        return torch.where(neighbours < 0, 0.0, dots)

    case = Case(
        lambda queries, keys: edge_affinity(queries, keys, neighbours), truth, {"queries": q, "keys": keys},
        ("queries", "keys"), scale=math.sqrt(samples * tokens * k * width), small=True,
    )  # fmt: skip
    turn = torch.linalg.qr(random(seed + 2, width, width))[0]
    case.same = [
        ("rotation of both", _with(case, queries=q @ turn, keys=keys @ turn)),
        ("scale of queries", lambda: (edge_affinity(q * 3, keys, neighbours), 3 * edge_affinity(q, keys, neighbours))),
    ]
    return case


def attention_on_graph(draw) -> Case:
    samples, tokens, width, seed = _tokens(draw)
    heads, k, edged = draw(st.integers(1, 3)), _size(draw, (1, 2, 3, 8)), draw(st.booleans())
    slope = draw(st.sampled_from([0.2, 0.0, 1.0]))
    neighbours = torch.randint(-1, tokens, (samples, tokens, k), generator=torch.Generator().manual_seed(seed))
    tensors = {
        "values": random(seed, samples, tokens, heads, width), "source_scores": random(seed + 1, samples, tokens, heads),
        "target_scores": random(seed + 2, samples, tokens, heads),
    }  # fmt: skip
    if edged:
        tensors["edge_scores"] = random(seed + 3, samples, tokens, k)

    def run(values: Tensor, source_scores: Tensor, target_scores: Tensor, edge_scores: Tensor | None = None) -> Tensor:
        return graph_attention(values, source_scores, target_scores, neighbours, slope, edge_scores)

    def truth(
        values: Tensor, source_scores: Tensor, target_scores: Tensor, edge_scores: Tensor | None = None
    ) -> Tensor:
        rows, listed = torch.arange(samples)[:, None, None], neighbours.clamp(min=0)
        e = F.leaky_relu(source_scores[rows, listed] + target_scores[:, :, None], slope)  # [B, T, k, H]
        e = e if edge_scores is None else e + edge_scores[..., None]
        power = e.exp() * (neighbours >= 0)[..., None]
        total = power.sum(2, keepdim=True)
        return ((power / total.where(total > 0, 1))[..., None] * values[rows, listed]).sum(2)

    case = Case(run, truth, tensors, tuple(tensors), scale=math.sqrt(samples * tokens * heads * width))
    case.kind = "routed"
    case.same = [
        ("scale of values", lambda: (run(**{**tensors, "values": 3 * tensors["values"]}), 3 * run(**tensors))),
    ]
    if edged:
        case.same.append(
            (
                "shift of a token's edges",
                _with(case, edge_scores=tensors["edge_scores"] + random(seed + 4, samples, tokens, 1)),
            )
        )
    return case


OPS: dict[str, Callable[..., Case]] = {
    "rsd_loss": rsd_op,
    "prepare_teacher": prepared,
    "rsd_loss_distributed": rsd_distributed,
    "vicreg_loss": vicreg_op,
    "make_plan": plan,
    "routed_ln_linear": ln_linear,
    "routed_norm": lambda draw: ln_linear(draw, linear=False),
    "routed_linear_residual": residual,
    "routed_residual": lambda draw: residual(draw, linear=False),
    "routed_linear_residual_": lambda draw: residual(draw, in_place=True),
    "routed_residual_": lambda draw: residual(draw, linear=False, in_place=True),
    "routed_attention": attention,
    "knn_graph": knn,
    "edge_affinity": affinity,
    "graph_attention": attention_on_graph,
}
