"""Checks of the self-supervised losses over ranks, run in every process of a group by tests/ranks.py.

The formulations they are compared with are written out with an all-reduce that autograd sees.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import all_reduce
from tolerances import TOLERANCES, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import xdfast

RANK, WORLD = dist.get_rank(), dist.get_world_size()
SPLITS = {2: [[10, 10], [16, 7]], 3: [[8, 8, 8], [3, 16, 4]]}[WORLD]
WIDTHS = [5, 24, 100]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def views(counts: list[int], d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This rank's rows of two correlated views."""
    generator = torch.Generator().manual_seed(d)
    z_a = torch.randn(sum(counts), d, dtype=torch.float64, generator=generator)
    z_b = 0.7 * z_a + torch.randn(sum(counts), d, dtype=torch.float64, generator=generator) + 0.5
    a, b = (x.split(counts)[RANK].to(dtype).detach().requires_grad_() for x in (z_a, z_b))
    return a, b


def compare(loss: Tensor, expected: Tensor, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], dtype) -> None:
    assert relative(loss, expected) < TOLERANCES["value", dtype]
    for a, w in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert a.dtype == dtype
        assert relative(a, w) < TOLERANCES["gradient", dtype]


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_() for x in tensors)


def check_barlow_twins_gathers_as_lightly_does() -> None:
    for counts, d, dtype in itertools.product(SPLITS, WIDTHS, DTYPES):
        a, b = views(counts, d, dtype)
        x, y = doubles(a, b)
        c = F.batch_norm(x, None, None, training=True).T @ F.batch_norm(y, None, None, training=True) / len(x)
        c = all_reduce(c / WORLD)
        off = c - torch.diag(c.diagonal())
        expected = (c.diagonal() - 1).square().sum() + 5e-3 * off.square().sum()
        loss = xdfast.BarlowTwinsLoss(gather_distributed=True)(a, b)
        compare(loss, expected, (a, b), (x, y), dtype)


def check_barlow_twins_with_global_statistics_is_that_of_one_process() -> None:
    for counts, d in itertools.product(SPLITS, WIDTHS):
        torch.manual_seed(d)
        images, other = torch.randn(2, sum(counts), 6, dtype=torch.float64)
        model = nn.Linear(6, d).double()
        alone = copy.deepcopy(model)
        expected = xdfast.BarlowTwinsLoss()(alone(images), alone(other))
        expected.backward()
        parallel = DistributedDataParallel(model)
        both = parallel(torch.cat([images.split(counts)[RANK], other.split(counts)[RANK]]))
        criterion = xdfast.BarlowTwinsLoss(gather_distributed=True, statistics="global")
        loss = criterion(*both.split(counts[RANK]))
        loss.backward()
        assert relative(loss, expected) < 1e-12
        assert relative(model.weight.grad, alone.weight.grad) < 1e-10


def check_vicreg_gathers_as_lightly_does() -> None:
    for counts, d, dtype in itertools.product(SPLITS, WIDTHS, DTYPES):
        a, b = views(counts, d, dtype)
        x, y = doubles(a, b)
        variance = covariance = 0
        for z in (x, y):
            # all_gather wants equal sizes: every rank's rows in their place, summed
            before, after = sum(counts[:RANK]), sum(counts[RANK + 1 :])
            rows = all_reduce(F.pad(z, (0, 0, before, after)))
            variance = variance + F.relu(1 - (rows.var(0) + 1e-4).sqrt()).mean()
            c = torch.cov(rows.T).reshape(d, d)
            covariance = covariance + (c - torch.diag(c.diagonal())).square().sum() / d
        expected = 25 * F.mse_loss(x, y) + 12.5 * variance + covariance
        loss = xdfast.VICRegLoss(gather_distributed=True)(a, b)
        compare(loss, expected, (a, b), (x, y), dtype)


def check_without_gathering_ranks_do_not_talk() -> None:
    a, b = views(SPLITS[1], 12)
    if RANK == 0:
        for criterion in (xdfast.BarlowTwinsLoss(), xdfast.VICRegLoss()):
            criterion(a, b).backward()


def check_errors_are_raised_on_every_rank() -> None:
    odd = RANK == WORLD - 1
    good = torch.randn(4, 5)
    for criterion in (
        xdfast.BarlowTwinsLoss(gather_distributed=True),
        xdfast.BarlowTwinsLoss(gather_distributed=True, statistics="global"),
        xdfast.VICRegLoss(gather_distributed=True),
    ):
        with pytest.raises(ValueError, match=r"z_a and z_b must have the same shape, got \[4, 5\] and \[3, 5\]"):
            criterion(good, good[:3] if odd else good)
        with pytest.raises(TypeError, match=r"z_a must be floating point"):
            criterion(good.long() if odd else good, good)
        with pytest.raises(RuntimeError, match=rf"rank {WORLD - 1}: width 6"):
            criterion(*[torch.randn(4, 6 if odd else 5)] * 2)
        learnt = good.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(criterion(learnt, good), learnt, create_graph=True)
        assert criterion(good, good).isfinite()
    for loss in (xdfast.BarlowTwinsLoss(gather_distributed=True), xdfast.VICRegLoss(gather_distributed=True)):
        with pytest.raises(ValueError, match="at least 2 samples"):
            loss(*[good[:1] if odd else good] * 2)


def check_compiles_without_graph_breaks() -> None:
    a, b = views(SPLITS[1], 30, torch.float32)
    for criterion in (xdfast.BarlowTwinsLoss(gather_distributed=True), xdfast.VICRegLoss(gather_distributed=True)):
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(a, b), a)
        (wanted,) = torch.autograd.grad(criterion(a, b), a)
        torch.testing.assert_close(actual, wanted)
