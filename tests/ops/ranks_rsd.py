"""Checks of the RSD loss over ranks, run in every process of a group by tests/ranks.py."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import all_reduce
from tolerances import TOLERANCES, relative
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import xdfast
from xdfast.ops.rsd import prepare_teacher, rsd_loss, rsd_loss_distributed
from xdfast.ops.rsd.reference import rsd_loss_reference, standardize

RANK, WORLD = dist.get_rank(), dist.get_world_size()

#: Rows per rank: equal; uneven; with an empty rank, of which one has a single row.
SPLITS = {1: [[23]], 2: [[12, 12], [16, 7], [0, 23]], 3: [[8, 8, 8], [3, 16, 4], [22, 0, 1]]}[WORLD]
#: ranks · largest rank ≥ D: all-reduce of the matrix; < D: all-gather of the rows. 24 is the border for 2 equal ranks.
WIDTHS = [1, 5, 24, 80, 100]


def batch(counts: list[int], d: int, dtype=torch.float64, mean: float = 1.0) -> tuple[Tensor, Tensor]:
    """The whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(d)
    student = torch.randn(sum(counts), d, dtype=torch.float64, generator=generator)
    noise = torch.randn(sum(counts), d, dtype=torch.float64, generator=generator)
    return (student - mean).to(dtype), (0.5 * student + 2 * noise + mean).to(dtype)


def own(x: Tensor, counts: list[int]) -> Tensor:
    return x.split(counts)[RANK].detach().clone()


def reference(student: Tensor, teacher: Tensor, eps_mode: str = "std", kappa: float = 0.01):
    s, t = student.detach().double().requires_grad_(), teacher.detach().double().requires_grad_()
    invariance, decorrelation, diagonal = rsd_loss_reference(s, t, 1e-5, eps_mode)
    loss = invariance + kappa * decorrelation
    return (loss, invariance, decorrelation, diagonal), torch.autograd.grad(loss, (s, t))


def gathered(x: Tensor, counts: list[int]) -> Tensor:
    parts = [torch.empty(n, x.shape[1], dtype=x.dtype) for n in counts]
    for rank, part in enumerate(parts):
        if rank == RANK:
            part.copy_(x)
        dist.broadcast(part, rank)
    return torch.cat(parts)


def check_values_and_gradients_are_those_of_the_whole_batch() -> None:
    for counts, d, dtype, both in itertools.product(
        SPLITS, WIDTHS, (torch.float64, torch.float32, torch.bfloat16), (False, True)
    ):
        student, teacher = batch(counts, d, dtype)
        s, t = own(student, counts).requires_grad_(), own(teacher, counts).requires_grad_(both)
        parts = rsd_loss_distributed(s, t, return_components=True)
        values, expected = reference(student, teacher)
        for actual, wanted in zip(parts, values, strict=True):
            assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert relative(actual, wanted) < TOLERANCES["value", dtype], (counts, d, dtype)
        grads = torch.autograd.grad(3 * parts.loss, [s, t][: 1 + both])
        for actual, wanted in zip(grads, expected, strict=False):
            assert actual.dtype == dtype
            whole = gathered(actual.float() if dtype == torch.bfloat16 else actual, counts)
            assert relative(whole, 3 * WORLD * wanted) < TOLERANCES["gradient", dtype], (counts, d, dtype)


def check_agreement_with_one_process_in_float32_to_1e_6() -> None:
    """Also with column means of 1e4 standard deviations."""
    for counts, d, mean, eps_mode in itertools.product(SPLITS, WIDTHS[1:], (0.0, 1e4), ("std", "var")):
        student, teacher = batch(counts, d, torch.float32, mean)
        s, t = own(student, counts).requires_grad_(), own(teacher, counts).requires_grad_()
        student.requires_grad_()
        teacher.requires_grad_()
        one = rsd_loss(student, teacher, eps_mode=eps_mode)
        many = rsd_loss_distributed(s, t, eps_mode=eps_mode)
        assert relative(many, one) < 1e-6, (counts, d, mean)
        grads = torch.autograd.grad(many, (s, t)), torch.autograd.grad(one, (student, teacher))
        for actual, wanted in zip(*grads, strict=True):
            assert relative(gathered(actual, counts), WORLD * wanted) < 1e-6, (counts, d, mean)


def check_half_precision_products() -> None:
    for counts, d, precision in itertools.product(SPLITS, (5, 80), ("bfloat16", "float16", "tf32")):
        student, teacher = batch(counts, d, torch.float32)
        s, t = own(student, counts).requires_grad_(), own(teacher, counts).requires_grad_()
        parts = rsd_loss_distributed(s, t, precision=precision, return_components=True)
        values, expected = reference(student, teacher)
        assert relative(parts.loss, values[0]) < TOLERANCES["value", "bfloat16 products"]
        # the diagonal is not made of rounded operands
        assert relative(parts.invariance, values[1]) < 1e-6
        assert relative(parts.mean_diagonal, values[3]) < 1e-6
        for actual, wanted in zip(torch.autograd.grad(parts.loss, (s, t)), expected, strict=True):
            error = relative(gathered(actual, counts), WORLD * wanted)
            assert error < TOLERANCES["gradient", "bfloat16 products"], (counts, d, precision, error)


def check_options_reach_the_loss() -> None:
    counts = SPLITS[-1]
    student, teacher = batch(counts, 12)
    s, t = own(student, counts), own(teacher, counts)
    for options in (
        {"kappa": 0.5}, {"kappa": 0.0}, {"eps": 0.3}, {"reduction": "feature"}, {"reduction": "mean"}, {"weight": 0.1},
        {"eps_mode": "var", "eps": 0.3},
    ):  # fmt: skip
        actual = rsd_loss_distributed(s, t, return_components=True, **options)
        wanted = rsd_loss(student, teacher, return_components=True, **options)
        for a, w in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, w, rtol=1e-12, atol=1e-14)
    # and through the module, without gradients
    criterion = xdfast.RSDLoss(kappa=0.3, weight=0.2, eps=1e-3, reduction="feature", statistics="global")
    wanted = xdfast.RSDLoss(kappa=0.3, weight=0.2, eps=1e-3, reduction="feature")(student, teacher)
    with torch.no_grad():
        torch.testing.assert_close(criterion(s, t), wanted)


def linear(d: int, dtype: torch.dtype, mean: float) -> tuple[nn.Linear, Tensor]:
    """A model and a batch on a dyadic grid: its products are exact in float32, whatever the order of the sums."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(6, d, dtype=dtype)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-64, 65, (d, 6), generator=generator) / 64)
        model.bias.fill_(mean)
    return model, (torch.randint(-32, 33, (23, 6), generator=generator) / 16).to(dtype)


def check_parameter_gradient_under_ddp_equals_one_process() -> None:
    counts = SPLITS[-1]
    for d, dtype, mean, ddp_average in itertools.product(
        (5, 100), (torch.float64, torch.float32), (0.0, 1e4), (True, False)
    ):
        model, images = linear(d, dtype, mean)
        teacher = batch(counts, d, dtype, mean)[1]
        alone = copy.deepcopy(model)
        rsd_loss(alone(images), teacher).backward()
        criterion = xdfast.RSDLoss(statistics="global", ddp_average=ddp_average)
        parallel = DistributedDataParallel(model)
        criterion(parallel(own(images, counts)), own(teacher, counts)).backward()
        factor = 1 if ddp_average else WORLD
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        # The bias has no gradient: the loss does not see column means. It is compared on the scale of the weight's.
        for parameter, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            error = (parameter.grad * factor - wanted.grad).norm() / alone.weight.grad.norm()
            assert error < tolerance, (d, dtype, mean, ddp_average, float(error))


def check_parameter_gradient_under_fsdp2_equals_one_process() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    counts = SPLITS[-1]
    model, images = linear(100, torch.float32, 0.0)
    teacher = batch(counts, 100, torch.float32)[1]
    alone = copy.deepcopy(model)
    rsd_loss(alone(images), teacher).backward()
    sharded = fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    xdfast.RSDLoss(statistics="global")(sharded(own(images, counts)), own(teacher, counts)).backward()
    assert relative(model.weight.grad.full_tensor(), alone.weight.grad) < 1e-6


def check_compiles_without_graph_breaks() -> None:
    counts = SPLITS[-1] if 0 not in SPLITS[-1] else SPLITS[0]
    for d in (5, 100):
        model, images = linear(d, torch.float32, 0.0)
        images, teacher = images.repeat(2, 1)[: sum(counts)], batch(counts, d, torch.float32)[1]
        criterion = xdfast.RSDLoss(statistics="global")
        images, teacher = own(images, counts), own(teacher, counts)
        compiled = torch.compile(lambda x, y, m=model: criterion(m(x), y), fullgraph=True, backend="aot_eager")  # noqa: B023
        (actual,) = torch.autograd.grad(compiled(images, teacher), model.weight)
        (wanted,) = torch.autograd.grad(criterion(model(images), teacher), model.weight)
        torch.testing.assert_close(actual, wanted)


def check_a_promise_of_even_batches_saves_the_exchange() -> None:
    counts = SPLITS[0]
    for d in (5, 100):
        student, teacher = batch(counts, d)
        s, t = own(student, counts).requires_grad_(), own(teacher, counts)
        results = []
        for uneven in (True, False):
            with torch.profiler.profile() as profile:
                loss = xdfast.RSDLoss(statistics="global", uneven=uneven)(s, t)
            messages = sum(event.name.startswith("gloo:") for event in profile.events())
            results.append((loss, torch.autograd.grad(loss, s)[0], messages))
        torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
        assert results[1][2] == (0 if WORLD == 1 else 2 if d == 5 else 3), results
        assert results[0][2] - results[1][2] == (0 if WORLD == 1 else 1), results


def check_no_matrix_of_d_by_d_when_the_batch_is_smaller() -> None:
    counts = SPLITS[-1]
    student, teacher = (own(x, counts).requires_grad_() for x in batch(counts, 512, torch.float32))
    with torch.profiler.profile(profile_memory=True) as profile:
        rsd_loss_distributed(student, teacher).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 512 * 512 * 4 / 2


def check_autocast_does_not_lower_the_precision() -> None:
    counts = SPLITS[0]
    student, teacher = batch(counts, 100, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rsd_loss_distributed(own(student, counts), own(teacher, counts))
        automatic = rsd_loss_distributed(own(student, counts), own(teacher, counts), precision="auto")
    expected = reference(student, teacher)[0][0]
    assert relative(loss, expected) < TOLERANCES["value", torch.float32]
    assert 0 < relative(automatic, expected) < TOLERANCES["value", "bfloat16 products"]


def check_only_the_loss_carries_a_gradient_and_backward_can_run_twice() -> None:
    counts = SPLITS[-1]
    student, teacher = (own(x, counts) for x in batch(counts, 12))
    student.requires_grad_()
    parts = rsd_loss_distributed(student, teacher, return_components=True)
    assert [part.requires_grad for part in parts] == [True, False, False, False]
    parts.loss.backward(retain_graph=True)
    once = student.grad.clone()
    parts.loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


def check_nan_reaches_every_rank() -> None:
    counts = SPLITS[-1]
    for d in (5, 100):
        student, teacher = batch(counts, d, torch.float32)
        student[0, 2] = float("nan")
        s = own(student, counts).requires_grad_()
        loss = rsd_loss_distributed(s, own(teacher, counts))
        assert loss.isnan()
        assert torch.autograd.grad(loss, s)[0][:, 2].isnan().all()


def check_a_constant_column_has_the_gradient_of_the_equation() -> None:
    counts = SPLITS[-1]
    for d in (5, 100):
        student, teacher = batch(counts, d)
        student[:, 1], teacher[:, 3] = 0.1, -7.0
        s = own(student, counts).requires_grad_()
        loss = rsd_loss_distributed(s, own(teacher, counts))
        values, (expected, _) = reference(student, teacher)
        assert relative(loss, values[0]) < 1e-10
        assert relative(gathered(torch.autograd.grad(loss, s)[0], counts), WORLD * expected) < 1e-8


def check_average_is_the_loss_of_the_mean_correlation() -> None:
    """Against autograd through all_reduce, whose backward sums over ranks."""
    for counts, d, both in itertools.product(SPLITS[:2], WIDTHS, (False, True)):
        student, teacher = batch(counts, d)
        s, t = own(student, counts).requires_grad_(), own(teacher, counts).requires_grad_(both)
        wanted_of = [s, t][: 1 + both]
        c = standardize(t, 1e-5).T @ standardize(s, 1e-5) / len(s)
        c = all_reduce(c / WORLD)
        diagonal = c.diagonal()
        expected = (diagonal - 1).square().sum() + 0.3 * (c.square().sum() - diagonal.square().sum())
        loss = rsd_loss_distributed(s, t, statistics="average", kappa=0.3)
        assert relative(loss, expected) < 1e-12
        for a, w in zip(torch.autograd.grad(loss, wanted_of), torch.autograd.grad(expected, wanted_of), strict=True):
            assert relative(a, w) < 1e-10, (counts, d)


def check_a_group_of_some_ranks() -> None:
    if WORLD == 1:
        group = dist.new_group([0])
        student, teacher = batch([23], 12)
        student.requires_grad_()
        losses = rsd_loss_distributed(student, teacher, group=group), rsd_loss(student, teacher)
        grads = [torch.autograd.grad(loss, student)[0] for loss in losses]
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(grads[0], grads[1])
        return
    members = [0, WORLD - 1]
    group = dist.new_group(members)
    if RANK not in members:
        with pytest.raises(ValueError, match="no member of the group"):
            xdfast.RSDLoss(statistics="global", group=group)
        name = "7"
        with pytest.raises(ValueError, match="knows no process group named '7'"):
            rsd_loss_distributed(torch.randn(4, 5), torch.randn(4, 5), group=name)
        return
    counts = [9, 4]
    student, teacher = batch(counts, 12)
    s, t = (x.split(counts)[members.index(RANK)] for x in (student, teacher))
    criterion = xdfast.RSDLoss(statistics="global", group=group)
    for loss in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(loss(s, t), rsd_loss(student, teacher))


def check_errors_are_raised_on_every_rank() -> None:
    """The last rank is the odd one out; the others raise the same, and the group is usable afterwards."""
    odd = RANK == WORLD - 1
    good = torch.randn(4, 5)
    cases: list[tuple[type[Exception], str, Tensor, Tensor, dict]] = [
        (TypeError, r"teacher must be floating point.*torch.int64", good, good.long() if odd else good, {}),
        (TypeError, r"student must be a torch.Tensor.*list", [1.0] if odd else good, good, {}),
        (ValueError, r"student must have shape \[N, D\].*got \[4\]", good[:, 0] if odd else good, good, {}),
        (ValueError, r"same shape, got \[3, 5\] and \[4, 5\]", good[:3] if odd else good, good, {}),
        (ValueError, "kappa must be finite", good, good, {"kappa": -1.0 if odd else 0.1}),
        (ValueError, "prepared teacher", good, prepare_teacher(good) if odd else good, {}),
        (ValueError, r"at least 2 samples|at least 2 samples, got \[0", good[:0], good[:0], {}),
        (ValueError, r"at least 2 samples", *(2 * [good[:1] if odd else good[:0]]), {}),
        (ValueError, r"at least 2 samples", *(2 * [good[:1] if odd else good]), {"statistics": "average"}),
    ]
    if WORLD > 1:
        double = good.double() if odd else good
        learnt = good.clone().requires_grad_(odd)
        wide = torch.randn(4, 6 if odd else 5)
        cases += [
            (RuntimeError, rf"rank {WORLD - 1}: width 6", wide, wide, {}),
            (RuntimeError, rf"rank {WORLD - 1}: student torch.float64", double, good, {}),
            (RuntimeError, rf"rank {WORLD - 1}: kappa 0.5", good, good, {"kappa": 0.5 if odd else 0.1}),
            (RuntimeError, rf"rank {WORLD - 1}: eps_mode var", good, good, {"eps_mode": "var" if odd else "std"}),
            (RuntimeError, "statistics average", good, good, {"statistics": "average" if odd else "global"}),
            (RuntimeError, rf"rank {WORLD - 1}: gradient of student True", learnt, good, {}),
        ]
    for kind, message, student, teacher, options in cases:
        with pytest.raises(kind, match=message) as caught:
            rsd_loss_distributed(student, teacher, **options)
        if kind is TypeError and WORLD > 1:
            assert f"on rank {WORLD - 1} of the group" in str(caught.value)
    torch.testing.assert_close(rsd_loss_distributed(good, good).isfinite(), torch.tensor(True))


def check_a_second_derivative_is_refused() -> None:
    student, teacher = torch.randn(4, 12, requires_grad=True), torch.randn(4, 12)
    loss = rsd_loss_distributed(student, teacher)
    if WORLD == 1:
        assert torch.autograd.grad(loss, student, create_graph=True)[0].requires_grad
        return
    with pytest.raises(RuntimeError, match='no second derivative.*statistics="local"'):
        torch.autograd.grad(loss, student, create_graph=True)
