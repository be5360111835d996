"""DKD, DIST, OFA, FitNet, RKD and CRD, each against its paper's equation written out in float64, sample by sample."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from tolerances import TOLERANCES, relative
from torch import Tensor

import xdfast
from xdfast.losses import CRDLoss, DISTLoss, DKDLoss, FitNetLoss, OFALoss, RKDLoss

N, C = 6, 5
LOGITS = ["dkd", "dist", "ofa"]
ALL = [*LOGITS, "fitnet", "rkd", "crd"]
SAMPLES = 20


def make(name: str, **options):
    if name == "crd":
        torch.manual_seed(5)  # the bank
        options = {"samples": SAMPLES, "dim": 4, "negatives": 7, **options}
    return xdfast.create_loss(name, **options)


def inputs(name: str, n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """(student, teacher, what the loss needs besides); the student asks for a gradient."""
    torch.manual_seed(n)
    shapes = {"fitnet": ((n, 3, 2, 2),) * 2, "rkd": ((n, 4), (n, 7)), "crd": ((n, 4),) * 2}.get(name, ((n, C),) * 2)
    student, teacher = (2 * torch.randn(shape, dtype=torch.float64) for shape in shapes)
    more = {"dkd": torch.arange(n) % C, "ofa": torch.arange(n) % C, "crd": torch.arange(n) * 3 % SAMPLES}
    return student.to(dtype).requires_grad_(), teacher.to(dtype), *([more[name]] if name in more else [])


def softmax(row: Tensor, tau: float) -> list[float]:
    powers = [math.exp(float(x) / tau) for x in row]
    return [x / sum(powers) for x in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return over / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(1.0, 2.0, 1.0), (0.5, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_dkd_is_equation_7(alpha, beta, tau) -> None:
    student, teacher, targets = inputs("dkd")
    total = 0.0
    for s, t, y in zip(student.detach(), teacher, targets.tolist(), strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        tckd = kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
        others = [c for c in range(C) if c != y]
        nckd = kl([p[c] / (1 - p[y]) for c in others], [q[c] / (1 - q[y]) for c in others])
        total += (alpha * tckd + beta * nckd) * tau**2 / N
    loss = DKDLoss(alpha, beta, tau, weight=0.3)(student, teacher, targets)
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-10)


def test_dkd_with_the_teachers_own_weights_is_kd() -> None:
    # the paper's equation 6: KD = TCKD + (1 − p_y) NCKD, sample by sample
    student, teacher, targets = inputs("dkd")
    for row in range(N):
        one = [x[row : row + 1] for x in (student, teacher, targets)]
        beta = 1 - teacher[row].softmax(0)[targets[row]].item()
        torch.testing.assert_close(DKDLoss(1.0, beta)(*one), xdfast.KDLoss(temperature=1)(*one[:2]))


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0)])
def test_dist_is_one_minus_the_correlation_of_rows_and_of_columns(beta, gamma, tau) -> None:
    student, teacher = inputs("dist")
    p, q = ([softmax(row, tau) for row in x.detach()] for x in (teacher, student))
    rows = sum(1 - correlation(a, b) for a, b in zip(p, q, strict=True)) / N
    columns = sum(1 - correlation([r[c] for r in p], [r[c] for r in q]) for c in range(C)) / C
    loss = DISTLoss(beta, gamma, tau, weight=0.3)(student, teacher)
    # ε = 1e-8 in the denominators, next to norms of about 0.3
    assert loss.item() == pytest.approx(0.3 * tau**2 * (beta * rows + gamma * columns), rel=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 0.3])
@pytest.mark.parametrize(("form", "tau"), [("paper", 1.0), ("code", 1.0), ("paper", 2.0)])
def test_ofa_is_the_enhanced_cross_entropy_without_the_labels_part(gamma, form, tau) -> None:
    student, teacher, targets = inputs("ofa")
    total = 0.0
    for s, t, y in zip(student.detach(), teacher, targets.tolist(), strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        # the paper: −(1 + p_y)^γ log q_y − Σ_{c≠y} p_c log q_c; distill adds −log q_y as a term of its own
        whole = -((1 + p[y]) ** gamma) * math.log(q[y])
        whole -= sum((p[c] if form == "paper" else p[c] ** gamma) * math.log(q[c]) for c in range(C) if c != y)
        total += (whole + math.log(q[y])) / N
    loss = OFALoss(gamma, tau, form, weight=0.3)(student, teacher, targets)
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-10)


def test_ofa_with_gamma_1_has_the_gradient_of_kd() -> None:
    student, teacher, targets = inputs("ofa")
    ofa, kd = OFALoss()(student, teacher, targets), xdfast.KDLoss(temperature=1)(student, teacher)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (ofa, kd)))


def test_fitnet_is_equation_3() -> None:
    student, teacher = inputs("fitnet")
    squares = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert FitNetLoss(0.3, "sample")(student, teacher).item() == pytest.approx(0.3 * sum(squares) / 2 / N, rel=1e-12)
    mean = 0.3 * sum(squares) / 2 / len(squares)
    assert FitNetLoss(0.3)(student, teacher).item() == pytest.approx(mean, rel=1e-12)


def huber(x: float, y: float) -> float:
    return (x - y) ** 2 / 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_rkd_is_equations_4_to_9(distance, angle) -> None:
    student, teacher = inputs("rkd")
    student = (student.detach() * 3).requires_grad_()
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    triplets = [(i, j, k) for i, j in pairs for k in range(N) if k not in (i, j)]

    def psi(f: Tensor) -> dict:
        lengths = {(i, j): math.dist(f[i].tolist(), f[j].tolist()) for i, j in pairs}
        mean = sum(lengths.values()) / len(pairs)
        return {pair: length / mean for pair, length in lengths.items()}

    def cosine(f: Tensor, i: int, j: int, k: int) -> float:
        a, b = (f[i] - f[j]).tolist(), (f[k] - f[j]).tolist()
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    s, t = student.detach(), teacher
    psi_s, psi_t = psi(s), psi(t)
    in_distance = sum(huber(psi_t[pair], psi_s[pair]) for pair in pairs)
    in_angle = sum(huber(cosine(t, *triplet), cosine(s, *triplet)) for triplet in triplets)
    loss = RKDLoss(distance, angle, weight=0.3)(student, teacher)
    expected = distance * in_distance / N**2 + angle * in_angle / N**3
    assert loss.item() == pytest.approx(0.3 * expected, rel=1e-10)


def test_rkd_knows_similar_figures() -> None:
    # relations are blind to rotation, shift and scale, whatever the width
    teacher = torch.randn(8, 3, dtype=torch.double)
    turn = torch.linalg.qr(torch.randn(5, 3, dtype=torch.double))[0]
    assert RKDLoss()(teacher @ turn.T * 7 + 2, teacher).item() == pytest.approx(0, abs=1e-20)
    assert RKDLoss()(torch.randn(8, 5, dtype=torch.double), teacher).item() > 0.5


def test_rkd_of_equal_samples_is_finite_with_gradient() -> None:
    student = torch.randn(5, 4, dtype=torch.double)
    student[1] = student[0]
    for x in (student, torch.zeros(5, 4, dtype=torch.double)):
        x = x.clone().requires_grad_()
        loss = RKDLoss()(x, torch.randn(5, 7, dtype=torch.double))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("normaliser", ["none", "first-batch"])
def test_crd_is_the_contrast_with_the_bank(normaliser) -> None:
    student, teacher, ids = inputs("crd")
    criterion = make("crd", normaliser=normaliser, weight=0.3)
    banks = {"student": criterion.teacher_bank.double(), "teacher": criterion.student_bank.double()}
    torch.manual_seed(9)
    drawn = criterion.draw(ids).tolist()
    total = 0.0
    for side, embedding in (("student", student.detach()), ("teacher", teacher)):
        powers = []  # of each row: e^{g·m/τ} with its own bank row first
        for g, own, others in zip(embedding, ids.tolist(), drawn, strict=True):
            g = g / g.norm()
            powers.append([math.exp(float(g @ banks[side][j]) / 0.07) for j in (own, *others)])
        mean = sum(sum(row) for row in powers) / (N * 8)
        z = SAMPLES * mean if normaliser == "first-batch" else 1.0
        for row in powers:
            h = [x / (x + z * 7 / SAMPLES) for x in row]  # N/M of the paper: 7 negatives, 20 samples
            total -= (math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])) / N
    torch.manual_seed(9)
    # the bank and Z are float32
    assert criterion(student, teacher, ids).item() == pytest.approx(0.3 * total, rel=1e-5)


def test_crds_bank_follows_the_batch_in_training_alone() -> None:
    student, teacher, ids = inputs("crd")
    criterion = make("crd", momentum=0.25)
    before = {side: getattr(criterion, f"{side}_bank").clone() for side in ("student", "teacher")}
    criterion.eval()(student, teacher, ids)
    assert torch.equal(criterion.student_bank, before["student"])
    criterion.train()(student, teacher, ids)
    for side, embedding in (("student", student), ("teacher", teacher)):
        expected = before[side].double()
        for row, own in zip(embedding.detach(), ids.tolist(), strict=True):
            moved = 0.25 * expected[own] + 0.75 * row / row.norm()
            expected[own] = moved / moved.norm()
        torch.testing.assert_close(getattr(criterion, f"{side}_bank").double(), expected, rtol=1e-5, atol=1e-6)


def test_crds_constant_is_that_of_the_first_batch_and_saved() -> None:
    student, teacher, ids = inputs("crd")
    criterion, other = make("crd"), make("crd")
    criterion(student, teacher, ids)
    first = criterion.log_z.clone()
    criterion(3 - student, teacher, ids)
    assert torch.equal(criterion.log_z, first) and (first != 0).all()
    other.load_state_dict(criterion.state_dict())
    values = []
    for loss in (criterion, other):
        torch.manual_seed(1)
        values.append(loss(student, teacher, ids))
    assert torch.equal(*values)


def test_crds_negatives_are_of_other_classes_all_of_them_alike() -> None:
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2])
    criterion = CRDLoss(8, dim=4, negatives=4000, labels=labels)
    for own, drawn in enumerate(criterion.draw(torch.arange(8))):
        allowed = (labels != labels[own]).nonzero().flatten()
        counts = drawn.bincount(minlength=8)
        assert set(drawn.unique().tolist()) == set(allowed.tolist())
        expected = 4000 / len(allowed)
        assert ((counts[allowed] - expected).abs() < 6 * expected**0.5).all()  # six standard deviations
    others = CRDLoss(8, dim=4, negatives=4000).draw(torch.arange(8))
    for own, drawn in enumerate(others):
        assert set(drawn.unique().tolist()) == set(range(8)) - {own}
    assert CRDLoss(8).negatives == 7 and CRDLoss(20_000, dim=1).negatives == 16384


def call(name: str, arguments: tuple[Tensor, ...], criterion=None) -> Tensor:
    criterion = make(name).eval() if criterion is None else criterion  # in eval mode CRD's bank stays: a function
    if name == "crd":
        criterion.z_is_known.fill_(True)
    torch.manual_seed(3)
    return criterion(*arguments)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name) -> None:
    student, teacher, *more = inputs(name)
    teacher.requires_grad_()
    criterion = make(name).eval().double()
    assert torch.autograd.gradcheck(lambda s, t: call(name, (s, t, *more), criterion), (student, teacher))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
def test_half_inputs_are_computed_in_single_precision(name, dtype, amp) -> None:
    student, teacher, *more = inputs(name, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        loss = call(name, (student, teacher, *more))
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = call(name, (exact, teacher.double(), *more))
    (wanted,) = torch.autograd.grad(expected, exact)
    assert gradient.dtype == dtype
    # DKD's and DIST's terms cancel by an order of magnitude
    assert relative(loss, expected) < 5 * TOLERANCES["value", dtype]
    assert relative(gradient, wanted) < 5 * TOLERANCES["gradient", torch.float32] + TOLERANCES["gradient", dtype]


@pytest.mark.parametrize("name", LOGITS)
def test_confident_logits_in_half_precision_do_not_overflow(name) -> None:
    student, teacher, *more = inputs(name, dtype=torch.float16)
    student = (student.detach() * 1e4).requires_grad_()
    loss = call(name, (student, teacher * 1e4, *more))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_one_sample(name) -> None:
    one = inputs(name, 1)
    if name in ("dist", "rkd"):
        with pytest.raises(ValueError, match=r"student must have at least 2 samples, got shape \[1, "):
            call(name, one)
    else:
        assert call(name, one).isfinite()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_nan_is_not_hidden(name, side) -> None:
    arguments = list(inputs(name))
    arguments[side] = arguments[side].detach().clone()
    arguments[side][0].view(-1)[0] = float("nan")
    assert call(name, tuple(arguments)).isnan()


@pytest.mark.parametrize("name", ALL)
def test_compiles_without_graph_breaks(name) -> None:
    student, teacher, *more = inputs(name, dtype=torch.float32)
    eager, compiled = make(name), make(name)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    results = []
    for criterion, forward in ((eager, eager), (compiled, run)):
        if name == "crd":  # a compiled function draws other numbers: the negatives are given
            chosen = torch.arange(7).repeat(N, 1)
            criterion.draw = lambda ids, chosen=chosen: chosen
        loss = forward(student, teacher, *more)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for a, b in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["dkd", "dist", "ofa", "fitnet", "crd"])
def test_shapes_that_differ(name) -> None:
    student, teacher, *more = inputs(name)
    with pytest.raises(ValueError, match=r"student and teacher must have the same shape, got \[6.*\] and \[5"):
        call(name, (student, teacher[:5], *more))


@pytest.mark.parametrize("name", ALL)
def test_dtypes_and_dimensions(name) -> None:
    student, teacher, *more = inputs(name)
    with pytest.raises(TypeError, match="student must be floating point.*got torch.int64"):
        call(name, (student.long(), teacher, *more))
    with pytest.raises(TypeError, match=r"teacher must be a torch\.Tensor"):
        call(name, (student, None, *more))
    with pytest.raises(ValueError, match=r"got \[[\d, ]+\]"):
        call(name, (student[None, None].squeeze(-1), teacher, *more)) if name != "fitnet" else call(
            name, (student.flatten(), teacher)
        )
    with pytest.raises(ValueError, match="weight must be finite and ≥ 0, got -1"):
        make(name, weight=-1)


def test_rkd_needs_the_same_samples() -> None:
    with pytest.raises(ValueError, match=r"must hold the same samples .* got \[4, 3\] on cpu and \[5, 3\]"):
        RKDLoss()(torch.randn(4, 3), torch.randn(5, 3))


@pytest.mark.parametrize("name", ["dkd", "ofa"])
def test_targets(name) -> None:
    student, teacher, targets = inputs(name)
    # mixup: the likeliest class counts
    mixed = torch.nn.functional.one_hot(targets, C) * 0.6 + 0.08
    torch.testing.assert_close(call(name, (student, teacher, mixed)), call(name, (student, teacher, targets)))
    for bad, message in (
        (targets[:5], r"targets must have shape \[6\], a class for each sample, got \[5\]"),
        (mixed[:, :4], r"class numbers \[6\] or probabilities \[6, 5\], got \[6, 4\]"),
        (targets + 1, r"targets must be in \[0, 5\), got 5"),
        (targets - 1, r"targets must be in \[0, 5\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(name, (student, teacher, bad))
    with pytest.raises(TypeError, match="targets must be a tensor of integers"):
        call(name, (student, teacher, targets.float()))


def test_dkd_and_dist_need_two_classes() -> None:
    one = torch.randn(4, 1)
    for loss in (lambda: DKDLoss()(one, one, torch.zeros(4, dtype=torch.long)), lambda: DISTLoss()(one, one)):
        with pytest.raises(ValueError, match=r"at least 2 classes, got shape \[4, 1\]"):
            loss()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dkd", {"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ("dkd", {"alpha": -1}, "alpha must be finite and ≥ 0"),
        ("dist", {"beta": float("nan")}, "beta must be finite"),
        ("ofa", {"form": "papr"}, "form must be one of 'paper', 'code', got 'papr'.*Did you mean 'paper'"),
        ("ofa", {"gamma": -0.5}, "gamma must be finite and ≥ 0"),
        ("fitnet", {"grid": 0}, "grid must be an integer ≥ 1"),
        ("fitnet", {"reduction": "sum"}, "reduction must be one of"),
        ("rkd", {"angle_weight": -1}, "angle_weight must be finite and ≥ 0"),
        ("crd", {"samples": 1}, "samples must be an integer ≥ 2, got 1"),
        ("crd", {"momentum": 1}, "momentum must be below 1"),
        ("crd", {"normaliser": "z"}, "normaliser must be one of"),
        ("crd", {"labels": torch.zeros(SAMPLES, dtype=torch.long)}, "all 20 labels are the same class"),
        ("crd", {"labels": torch.zeros(3, dtype=torch.long)}, r"labels must be int64 \[20\].*got torch.int64 \[3\]"),
    ],
)
def test_bad_options(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_crds_inputs() -> None:
    criterion = CRDLoss(10, dim=4)
    g = torch.randn(3, 4)
    for ids, message in ((torch.tensor([0, 1, 10]), r"\[0, 10\), got 10"), (torch.tensor([0, 1]), r"shape \[3\]")):
        with pytest.raises(ValueError, match=message):
            criterion(g, g, ids)
    with pytest.raises(TypeError, match="ids must be a tensor of integers"):
        criterion(g, g, torch.zeros(3))
    with pytest.raises(ValueError, match=r"embeddings must have shape \[B, 4\], got \[3, 5\]; pass dim=5"):
        criterion(torch.randn(3, 5), torch.randn(3, 5), torch.arange(3))


@pytest.mark.parametrize(
    "module",
    [*(f"losses.{name}" for name in (*ALL, "base")), "nn.spatial", "nn.ofa_projector", "nn.contrast_heads"],
)
def test_examples_in_docstrings_run(module) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"xdfast.{module}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0 and tried > 0
