"""The RSD loss over 1, 2 and 3 processes: ranks_rsd.py holds the checks, each a test here."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import ranks
import torch

import xdfast
from xdfast.ops.rsd import PreparedTeacher, distributed, prepare_teacher, rsd_loss, rsd_loss_distributed

CHECKS = Path(__file__).with_name("ranks_rsd.py")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow), 3], ids="{}-ranks".format)
def outcome(request, tmp_path_factory) -> dict[str, str]:
    return ranks.run(CHECKS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.ddp
@pytest.mark.parametrize("check", ranks.names(CHECKS))
def test_over_ranks(outcome, check) -> None:
    if outcome[check]:
        pytest.fail(outcome[check], pytrace=False)


def test_without_a_process_group_global_is_local() -> None:
    student, teacher = torch.randn(8, 12, requires_grad=True), torch.randn(8, 12)
    for options in ({}, {"kappa": 0.5, "reduction": "mean", "eps_mode": "var"}):
        for statistics in ("global", "average"):
            actual = rsd_loss_distributed(student, teacher, statistics=statistics, **options)
            assert actual.item() == rsd_loss(student, teacher, **options).item()
    assert xdfast.RSDLoss(statistics="global")(student, teacher).item() == xdfast.RSDLoss()(student, teacher).item()
    # one process: the second derivative is there
    assert torch.autograd.grad(rsd_loss_distributed(student, teacher), student, create_graph=True)[0].requires_grad


def test_a_prepared_teacher_is_refused() -> None:
    student, teacher = torch.randn(8, 12), prepare_teacher(torch.randn(8, 12))
    assert isinstance(teacher, PreparedTeacher)
    with pytest.raises(ValueError, match='statistics of one process.*statistics="local"'):
        rsd_loss_distributed(student, teacher)
    criterion = xdfast.RSDLoss(statistics="global")
    with pytest.raises(ValueError, match="prepared teacher"):
        criterion(student, teacher)
    with pytest.raises(ValueError, match="prepared teacher"):
        criterion.prepare(student)


def test_options_of_the_loss() -> None:
    with pytest.raises(ValueError, match="statistics must be one of 'local', 'global', got 'globl'.*global"):
        xdfast.RSDLoss(statistics="globl")
    with pytest.raises(ValueError, match='group has a meaning only with statistics="global"'):
        xdfast.RSDLoss(group="0")
    with pytest.raises(TypeError, match="group must be a torch.distributed.ProcessGroup or None.*got list"):
        xdfast.RSDLoss(statistics="global", group=[0, 1])
    with pytest.raises(ValueError, match="no member of the group"):
        xdfast.RSDLoss(statistics="global", group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="statistics must be one of 'global', 'average', got 'local'"):
        rsd_loss_distributed(torch.randn(4, 5), torch.randn(4, 5), statistics="local")
    assert "statistics='global'" in repr(xdfast.RSDLoss(statistics="global"))


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(distributed).failed == 0
