"""Cases of every public loss: inputs by hypothesis, the paper's equation in float64, and what its maths promises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hardening_cases import SIZES, SMALL, Case, random
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import xdfast
from xdfast.losses import ActDistillLoss, BarlowTwinsLoss, BudgetLoss, VICRegLoss, stage1_loss

seeds = st.integers(0, 2**20)
weights = st.sampled_from([1.0, 0.1, 3.0])
spreads = st.sampled_from([1.0, 1.0, 1e-2, 1e2])


def _size(draw, sizes=SIZES, least: int = 1, most: int = 65) -> int:
    return draw(st.sampled_from([n for n in sizes if least <= n <= most]))


def _permuted(case: Case, names: tuple[str, ...], seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same samples in another order."""

    def pair() -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(case.tensors[names[0]]), generator=torch.Generator().manual_seed(seed))
        return case.run(**{n: t[order] if n in names else t for n, t in case.tensors.items()}), case.run(**case.tensors)

    return pair


def _with(case: Case, **changed: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (case.run(**{**case.tensors, **changed}), case.run(**case.tensors))


# --- cross-correlation ------------------------------------------------------------------------------------------------


def correlation_loss(student: Tensor, teacher: Tensor, kappa: float, eps: float, mode: str = "std") -> Tensor:
    """Σᵢ (Pᵢᵢ − 1)² + κ Σᵢ≠ⱼ Pᵢⱼ² with every P written out."""
    z = []
    for x in (student, teacher):
        centred = x - x.sum(0) / len(x)
        variance = (centred * centred).sum(0) / len(x)
        # at 0 the root has no derivative; there the centred values are 0, and so is all that it would multiply
        std = variance.where(variance > 0, 1).sqrt().where(variance > 0, 0)
        z.append(centred / (std + eps) if mode == "std" else centred / (variance + eps).sqrt())
    p = torch.einsum("ni,nj->ij", z[1], z[0]) / len(student)
    on = torch.eye(p.shape[0], dtype=torch.bool)
    return (p[on] - 1).square().sum() + kappa * p[~on].square().sum()


def _correlation_case(draw, make, names: tuple[str, str], sharp) -> Case:
    """``make(D)``: (ours, factor of its value, κ, ε, where ε is added); ``sharp()``: ours with almost no ε."""
    n, d = _size(draw, least=2), _size(draw)
    spread, seed = draw(spreads), draw(seeds)
    a, b = random(seed, n, d, scale=spread, shift=draw(st.sampled_from([0.0, 3.0])) * spread), random(seed + 1, n, d)
    criterion, factor, kappa, eps, mode = make(d)
    first, second = names

    def run(**t: Tensor) -> Tensor:
        return criterion(t[first], t[second])

    def exact(**t: Tensor) -> Tensor:
        return factor * correlation_loss(t[first], t[second], kappa, eps, mode)

    scale = max(factor * (d + kappa * d * d), 1e-12)
    # Columns of two or three samples can have any standard deviation near zero: gradients are differences divided by it.
    std = min(float(x.std(0, correction=0).min()) for x in (a, b))
    case = Case(run, exact, {first: a, second: b}, (first, second), scale=scale, grad_scale=scale / std, small=n >= 5)
    case.well = n >= 5
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    case.same = [
        ("permutation of samples", _permuted(case, names, seed)),
        ("shift of columns", _with(case, **{first: a + random(seed + 2, d), second: b - 4})),
        ("permutation of features", _with(case, **{first: a[:, order], second: b[:, order]})),
    ]
    if sharp is not None:
        tiny, factors = sharp(), random(seed + 3, d).abs() + 0.5
        case.same.append(("scale of columns", lambda: (tiny(a * factors, b * 7), tiny(a, b))))
        case.same.append(("sign of a feature in both", lambda: (tiny(-a, -b), tiny(a, b))))
    return case


def rsd(draw, name: str = "rsd") -> Case:
    kappa, eps = draw(st.sampled_from([0.01, 0.0, 1.0, 0.3])), draw(st.sampled_from([1e-5, 1e-3]))
    reduction, weight = draw(st.sampled_from(["sum", "feature", "mean"])), draw(weights)
    parts, statistics = draw(st.booleans()), draw(st.sampled_from(["local", "global"]))

    def make(d: int):
        criterion = xdfast.create_loss(
            name,
            kappa=kappa,
            eps=eps,
            reduction=reduction,
            weight=weight,
            return_components=parts,
            statistics=statistics,
        )
        divisor = {"sum": 1, "feature": d, "mean": d * d}[reduction]
        return (lambda s, t: criterion(s, t).loss if parts else criterion(s, t)), weight / divisor, kappa, eps, "std"

    return _correlation_case(
        draw, make, ("student", "teacher"),
        lambda: xdfast.create_loss(name, kappa=kappa, eps=1e-13, reduction=reduction, weight=weight),
    )  # fmt: skip


def rsd_prepared(draw) -> Case:
    """RSDLoss with the teacher's half computed before."""
    case = rsd(draw)
    criterion = xdfast.RSDLoss()
    case.run = lambda student, teacher: criterion(student, criterion.prepare(teacher))
    case.truth = lambda student, teacher: correlation_loss(student, teacher.detach(), 0.01, 1e-5)
    d = case.tensors["student"].shape[1]
    case.grad_scale *= (d + 0.01 * d * d) / case.scale
    case.scale = d + 0.01 * d * d
    case.learning, case.detached, case.same = ("student",), ("teacher",), case.same[:1]
    return case


def barlow(draw, registered: bool = False) -> Case:
    kappa, weight = draw(st.sampled_from([5e-3, 0.0, 1.0])), draw(weights)

    def make(d: int):
        options = {"lambda_param": kappa, "weight": weight, "gather_distributed": draw(st.booleans())}
        criterion = xdfast.create_loss("barlow-twins", **options) if registered else BarlowTwinsLoss(**options)
        return criterion, weight, kappa, 1e-5, "var"

    return _correlation_case(draw, make, ("z_a", "z_b"), None)


def vicreg(draw) -> Case:
    n, d, seed = _size(draw, least=2), _size(draw), draw(seeds)
    lam, mu, nu = (draw(st.sampled_from(v)) for v in ([25.0, 0.0, 1.0], [25.0, 0.0], [1.0, 0.0, 5.0]))
    eps, spread = draw(st.sampled_from([1e-4, 1e-2])), draw(st.sampled_from([1.0, 0.3, 2.0]))
    a, b = random(seed, n, d, scale=spread), random(seed + 1, n, d, shift=2.0)
    criterion = VICRegLoss(lam, mu, nu, gather_distributed=draw(st.booleans()), eps=eps)

    def truth(z_a: Tensor, z_b: Tensor) -> Tensor:
        total = lam * F.mse_loss(z_a, z_b)
        for z in (z_a, z_b):
            c = torch.cov(z.T).reshape(d, d)
            total = total + mu / 2 * F.relu(1 - (torch.diagonal(c) + eps).sqrt()).mean()
            total = total + nu * (c.square().sum() - torch.diagonal(c).square().sum()) / d
        return total

    norms = sum(float(torch.cov(z.T).square().sum()) for z in (a, b))
    scale = lam + mu + nu * norms / d + 1e-9
    case = Case(lambda z_a, z_b: criterion(z_a, z_b), truth, {"z_a": a, "z_b": b}, ("z_a", "z_b"), scale=scale)
    case.grad_scale = scale / min(spread, 1.0)
    case.small = mu == 0
    shift = random(seed + 2, d)
    case.same = [
        ("permutation of samples", _permuted(case, ("z_a", "z_b"), seed)),
        ("shift of both views", _with(case, z_a=a + shift, z_b=b + shift)),
        ("views exchanged", _with(case, z_a=b, z_b=a)),
    ]
    return case


# --- logits -----------------------------------------------------------------------------------------------------------


def _logits(draw, least_n: int = 1, least_c: int = 1) -> tuple[int, int, int, Tensor, Tensor]:
    n, c, seed = _size(draw, least=least_n), _size(draw, least=least_c), draw(seeds)
    spread = draw(st.sampled_from([1.0, 2.0, 0.1]))
    return n, c, seed, random(seed, n, c, scale=spread), random(seed + 1, n, c, scale=2, shift=1)


def _of_logits(case: Case, seed: int, targets: bool = False) -> Case:
    n, c = case.tensors["student"].shape
    names = ("student", "teacher", "targets") if targets else ("student", "teacher")
    row = random(seed + 2, n, 1)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    changed = {name: case.tensors[name][:, order] for name in names[:2]}
    if targets:
        changed["targets"] = order.argsort()[case.tensors["targets"]]
    case.same = [
        ("permutation of samples", _permuted(case, names, seed)),
        ("shift of a sample's logits", _with(case, student=case.tensors["student"] + row, teacher=case.tensors["teacher"] - row)),
        ("permutation of classes", _with(case, **changed)),
    ]  # fmt: skip
    return case


def kd(draw) -> Case:
    n, _, seed, s, t = _logits(draw)
    tau, weight = draw(st.sampled_from([4.0, 1.0, 0.5])), draw(weights)
    criterion = xdfast.create_loss("kd", temperature=tau, weight=weight)

    def truth(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = torch.softmax(teacher / tau, 1), torch.softmax(student / tau, 1)
        return weight * tau**2 / n * (p * (p.log() - q.log())).sum()

    case = Case(
        criterion.forward, truth, {"student": s, "teacher": t}, ("student",), ("teacher",), scale=weight * tau**2
    )
    case.detached, case.small = (), True
    return _of_logits(case, seed)


def dkd(draw) -> Case:
    n, c, seed, s, t = _logits(draw, least_c=2)
    alpha, beta, tau = (draw(st.sampled_from(v)) for v in ([1.0, 0.0, 0.5], [2.0, 0.0, 8.0], [1.0, 4.0]))
    criterion = xdfast.create_loss("dkd", alpha=alpha, beta=beta, temperature=tau)
    targets = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))

    def truth(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        p, q = (torch.softmax(x / tau, 1) for x in (teacher, student))
        hit = F.one_hot(targets, c).bool()
        py, qy = p[hit], q[hit]
        rest_p, rest_q = (x[~hit].view(n, c - 1) for x in (p, q))
        not_p, not_q = rest_p.sum(1), rest_q.sum(1)
        tckd = py * (py / qy).log() + not_p * (not_p / not_q).log()
        a, b = rest_p / not_p[:, None], rest_q / not_q[:, None]
        return (alpha * tckd + beta * (a * (a / b).log()).sum(1)).mean() * tau**2

    tensors = {"student": s, "teacher": t, "targets": targets}
    case = Case(criterion.forward, truth, tensors, ("student",), scale=(alpha + beta) * tau**2 + 1e-9, small=True)
    return _of_logits(case, seed, targets=True)


def dist(draw) -> Case:
    _, c, seed, s, t = _logits(draw, least_n=2, least_c=2)
    n = len(s)
    beta, gamma, tau = (draw(st.sampled_from(v)) for v in ([1.0, 2.0, 0.0], [1.0, 0.5, 0.0], [1.0, 4.0]))
    criterion = xdfast.create_loss("dist", beta=beta, gamma=gamma, temperature=tau)

    def rho(a: Tensor, b: Tensor) -> Tensor:
        """Correlation of the rows."""
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt() + 1e-8)

    def truth(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (torch.softmax(x / tau, 1) for x in (student, teacher))
        return tau**2 * (beta * (1 - rho(p, q).mean()) + gamma * (1 - rho(p.T, q.T).mean()))

    case = Case(
        criterion.forward, truth, {"student": s, "teacher": t}, ("student",), scale=(beta + gamma) * tau**2 + 1e-9
    )
    # Two samples or classes always correlate by ±1: all that is left of value and gradient is rounding.
    case.well, case.small = n > 4 and c > 4, n > 3 and c > 3
    spread = float(s.std()) if s.numel() > 1 else 1.0
    case.grad_scale = case.scale * tau / spread
    return _of_logits(case, seed)


def ofa(draw) -> Case:
    n, c, seed, s, t = _logits(draw)
    gamma, tau, form = (draw(st.sampled_from(v)) for v in ([1.0, 1.4, 0.3], [1.0, 2.0], ["paper", "code"]))
    criterion = xdfast.create_loss("ofa", gamma=gamma, temperature=tau, form=form)
    targets = torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))

    def truth(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        p, q = (torch.softmax(x / tau, 1) for x in (teacher, student))
        hit = F.one_hot(targets, c).double()
        factor = hit * ((1 + p) ** gamma - 1) + (1 - hit) * (p if form == "paper" else p**gamma)
        return -(factor * q.log()).sum() / n

    tensors = {"student": s, "teacher": t, "targets": targets}
    return _of_logits(Case(criterion.forward, truth, tensors, ("student",), small=True), seed, targets=True)


# --- features ---------------------------------------------------------------------------------------------------------


def mse(draw) -> Case:
    n, d, seed, spread = _size(draw), _size(draw), draw(seeds), draw(spreads)
    reduction, weight = draw(st.sampled_from(["mean", "sample"])), draw(weights)
    criterion = xdfast.create_loss("mse", reduction=reduction, weight=weight)
    s, t = random(seed, n, d, scale=spread), random(seed + 1, n, d, scale=spread)

    def truth(student: Tensor, teacher: Tensor) -> Tensor:
        return weight * (teacher - student).pow(2).sum() / (n * d if reduction == "mean" else n)

    case = Case(criterion.forward, truth, {"student": s, "teacher": t}, ("student", "teacher"), scale=0.0)
    case.same = [
        ("permutation of samples", _permuted(case, ("student", "teacher"), seed)),
        ("shift of both", _with(case, student=s + 1, teacher=t + 1)),
        ("scale of both", lambda: (criterion(3 * s, 3 * t), 9 * criterion(s, t))),
        ("exchanged", _with(case, student=t, teacher=s)),
    ]
    case.small = spread == 1.0
    case.scale = 1e-9
    return case


def fitnet(draw) -> Case:
    n, seed = _size(draw, SMALL), draw(seeds)
    shape = (n, *(_size(draw, SMALL) for _ in range(draw(st.integers(1, 3)))))
    reduction = draw(st.sampled_from(["mean", "sample"]))
    criterion = xdfast.create_loss("fitnet", reduction=reduction)
    s, t = random(seed, *shape), random(seed + 1, *shape)

    def truth(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).pow(2).sum() / 2 / (student.numel() if reduction == "mean" else n)

    case = Case(criterion.forward, truth, {"student": s, "teacher": t}, ("student", "teacher"), scale=1e-9, small=True)
    case.same = [
        ("permutation of samples", _permuted(case, ("student", "teacher"), seed)),
        ("shift of both", _with(case, student=s - 2, teacher=t - 2)),
    ]
    return case


def rkd(draw) -> Case:
    n, d, e, seed = _size(draw, SMALL, least=2), _size(draw, most=33), _size(draw, most=33), draw(seeds)
    w_d, w_a = draw(st.sampled_from([25.0, 0.0, 1.0])), draw(st.sampled_from([50.0, 0.0, 1.0]))
    criterion = xdfast.create_loss("rkd", distance_weight=w_d, angle_weight=w_a)
    s, t = random(seed, n, d), random(seed + 1, n, e, scale=3)
    pairs = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j])
    triplets = torch.tensor(
        [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3] or [[0, 1, 0]]
    )

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (x[pairs[:, 0]] - x[pairs[:, 1]]).pow(2).sum(1).sqrt()
        i, j, k = triplets.T
        return lengths / lengths.mean(), F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=1, eps=1e-30)

    def truth(student: Tensor, teacher: Tensor) -> Tensor:
        (psi_s, cos_s), (psi_t, cos_t) = parts(student), parts(teacher)
        loss = w_d * F.huber_loss(psi_s, psi_t, reduction="sum") / n**2
        return loss + (w_a * F.huber_loss(cos_s, cos_t, reduction="sum") / n**3 if n > 2 else 0)

    case = Case(criterion.forward, truth, {"student": s, "teacher": t}, ("student",), scale=w_d + w_a + 1e-9)
    closest = min(float(torch.pdist(x).min()) for x in (s, t))
    case.grad_scale = case.scale / closest
    case.well, case.small = closest > 0.1, closest > 0.3 and w_a == 0
    turn = torch.linalg.qr(random(seed + 2, d, d))[0]
    case.same = [
        ("permutation of samples", _permuted(case, ("student", "teacher"), seed)),
        ("rotation, shift and scale", _with(case, student=5 * s @ turn + 1, teacher=t / 4 - 2)),
    ]
    return case


def crd(draw) -> Case:
    n, dim, seed = _size(draw, SMALL), _size(draw, SMALL), draw(seeds)
    samples, negatives = draw(st.sampled_from([9, 17, 64])), draw(st.sampled_from([1, 2, 7, 16]))
    normaliser = draw(st.sampled_from(["first-batch", "none"]))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    criterion = xdfast.create_loss("crd", samples=samples, dim=dim, negatives=negatives, normaliser=normaliser).eval()
    for bank in ("student_bank", "teacher_bank"):  # at full precision, or the promise of float64 could not be kept
        setattr(criterion, bank, F.normalize(getattr(criterion, bank).double(), dim=1))
    criterion.log_z = criterion.log_z.double()
    ids = torch.randperm(samples, generator=generator)[:n]
    table = torch.stack([torch.randint(samples, (negatives,), generator=generator) for _ in range(samples)])
    criterion.draw = lambda ids: table[ids]
    s, t = random(seed, n, dim), random(seed + 1, n, dim)

    def run(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        criterion.z_is_known.fill_(normaliser == "none")
        return criterion(student, teacher, ids)

    def truth(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for g, bank in ((student, criterion.teacher_bank), (teacher, criterion.student_bank)):
            g = g / g.pow(2).sum(1, keepdim=True).sqrt()
            power = torch.einsum("bd,bkd->bk", g, bank[torch.cat((ids[:, None], table[ids]), 1)]).div(0.07).exp()
            z = samples * power.detach().mean() if normaliser == "first-batch" else 1.0
            h = power / (power + z * negatives / samples)
            total = total - (h[:, 0].log() + (1 - h[:, 1:]).log().sum(1)).mean()
        return total

    case = Case(run, truth, {"student": s, "teacher": t, "ids": ids}, ("student", "teacher"), scale=float(negatives))
    case.grad_scale = case.scale / 0.07 / min(float(s.norm(dim=1).min()), float(t.norm(dim=1).min()))
    case.same = [
        ("permutation of samples", _permuted(case, ("student", "teacher", "ids"), seed)),
        ("length of embeddings", _with(case, student=s * 9, teacher=t / 5)),
    ]
    return case


# --- routed and action losses -----------------------------------------------------------------------------------------


def budget(draw) -> Case:
    units, layers, branches, seed = _size(draw), _size(draw, SMALL), draw(st.integers(1, 3)), draw(seeds)
    target, norm = draw(st.sampled_from([0.5, 0.25, 1.0])), draw(st.sampled_from(["squared", "hinge"]))
    weight, balance, decisive = draw(weights), draw(st.sampled_from([0.0, 0.7])), draw(st.sampled_from([0.0, 0.3]))
    costs = random(seed, layers, branches).abs() + 0.1 if draw(st.booleans()) else None
    # shares of given costs are held in float32; without costs there are none, only a mean
    share = torch.full((layers, branches), 1 / (layers * branches), dtype=torch.float64)
    share = share if costs is None else (costs / costs.sum()).float().double()
    on = (0,) if layers > 2 and float(share[0].sum()) < target else ()
    criterion = BudgetLoss(target, costs, on, norm, weight, balance=balance, decisive=decisive)
    uniform = torch.special.ndtr(random(seed + 1, units, layers, branches))
    gates, chances = uniform, torch.special.ndtr(random(seed + 2, units, layers, branches))

    def run(gates: Tensor, probabilities: Tensor | None = None) -> Tensor:
        return criterion(gates, probabilities)

    def truth(gates: Tensor, probabilities: Tensor | None = None) -> Tensor:
        usage = gates.mean(0)
        routed = torch.ones(layers, dtype=torch.bool)
        routed[list(on)] = False
        used = torch.where(routed[:, None], usage, 1.0)
        excess = (used * share).sum() - target
        loss = excess**2 if norm == "squared" else F.relu(excess)
        loss = loss + balance * usage[routed].var(correction=0)
        if probabilities is None:
            return weight * loss
        return weight * (loss + decisive * (4 * probabilities * (1 - probabilities))[:, routed].mean())

    tensors = {"gates": gates, "probabilities": chances} if decisive else {"gates": gates}
    case = Case(run, truth, tensors, tuple(tensors), scale=weight)
    case.exclude, case.small = ("1e4",), norm == "squared"
    case.same = [("permutation of units", _permuted(case, tuple(tensors), seed))]
    return case


def actdistill(draw) -> Case:
    layers, n, width, steps, actions = (_size(draw, (1, 2, 3, 4, 5)) for _ in range(5))
    gamma, alpha, beta, eta = (draw(st.sampled_from(v)) for v in ([0.0, 2.0], [1.0, 0.3], [1.0, 0.0], [0.5, 0.0]))
    reduction, seed, masked = draw(st.sampled_from(["mean", "sum", "none"])), draw(seeds), draw(st.booleans())
    criterion = ActDistillLoss(layers, gamma, alpha, beta, eta, reduction)
    mask = random(seed + 9, n, steps) > -0.5
    mask[0, 0] = True
    tensors = {
        "semantics": random(seed, layers, n, width), "actions": random(seed + 1, layers, n, steps, actions),
        "teacher_semantics": random(seed + 2, layers, n, width),
        "teacher_actions": random(seed + 3, layers, n, steps, actions), "target": random(seed + 4, n, steps, actions),
    }  # fmt: skip
    shares = criterion.weights.double()

    def run(**t: Tensor) -> Tensor:
        return criterion(**t, mask=mask if masked else None)

    def truth(semantics: Tensor, actions: Tensor, teacher_semantics: Tensor, teacher_actions: Tensor, target: Tensor):
        kept = mask if masked else torch.ones_like(mask)
        losses = []
        for layer in range(layers):
            s, ts = semantics[layer], teacher_semantics[layer]
            cos = [F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (s, ts)]
            loss = alpha * ((1 - F.cosine_similarity(s, ts, dim=-1)).mean() + eta * (cos[0] - cos[1]).pow(2).mean())
            goals = [target, teacher_actions[layer], *([actions[layer - 1].detach()] if layer else [])]
            losses.append(loss + beta * sum((actions[layer] - goal)[kept].pow(2).mean() for goal in goals))
        weighted = torch.stack(losses) * shares
        return {"mean": weighted.mean(), "sum": weighted.sum(), "none": weighted}[reduction]

    case = Case(run, truth, tensors, ("semantics", "actions"), ("teacher_semantics", "teacher_actions", "target"))
    shortest = min(float(tensors[name].norm(dim=-1).min()) for name in ("semantics", "teacher_semantics"))
    case.scale = (1 + beta) * float(shares.max())
    case.grad_scale, case.well = case.scale * (1 + 1 / shortest), shortest > 0.05

    def rescaled() -> tuple[Tensor, Tensor]:
        longer = {name: tensors[name] * 3 for name in ("semantics", "teacher_semantics")}
        return run(**{**tensors, **longer}), run(**tensors)

    if shortest > 1e-3:
        case.same = [("length of semantic vectors", rescaled)]
    return case


def stage1(draw) -> Case:
    layers, n, steps, actions = (_size(draw, (1, 2, 3, 4, 5)) for _ in range(4))
    reduction, seed = draw(st.sampled_from(["mean", "sum", "none"])), draw(seeds)
    tensors = {"actions": random(seed, layers, n, steps, actions), "target": random(seed + 1, n, steps, actions)}

    def truth(actions: Tensor, target: Tensor) -> Tensor:
        each = torch.stack([F.mse_loss(a, target) for a in actions])
        return {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]

    case = Case(
        lambda actions, target: stage1_loss(actions, target, reduction=reduction), truth, tensors, ("actions",),
        ("target",), scale=1e-9, small=True,
    )  # fmt: skip
    by_two = {name: t + 2 for name, t in tensors.items()}
    case.same = [("shift of both", _with(case, **by_two))]
    return case


LOSSES: dict[str, Callable[..., Case]] = {
    "rsd": rsd,
    "rsd-logits": lambda draw: rsd(draw, "rsd-logits"),
    "kd": kd,
    "mse": mse,
    "dkd": dkd,
    "dist": dist,
    "ofa": ofa,
    "fitnet": fitnet,
    "rkd": rkd,
    "crd": crd,
    "barlow-twins": lambda draw: barlow(draw, registered=True),
    "RSDLoss, prepared teacher": rsd_prepared,
    "BarlowTwinsLoss": barlow,
    "VICRegLoss": vicreg,
    "BudgetLoss": budget,
    "ActDistillLoss": actdistill,
    "stage1_loss": stage1,
}
