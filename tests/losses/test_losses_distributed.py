"""Barlow Twins and VICReg over 2 and 3 processes: ranks_losses.py holds the checks, each a test here."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.ddp

CHECKS = Path(__file__).with_name("ranks_losses.py")


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids="{}-ranks".format)
def outcome(request, tmp_path_factory) -> dict[str, str]:
    return ranks.run(CHECKS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ranks.names(CHECKS))
def test_over_ranks(outcome, check) -> None:
    if outcome[check]:
        pytest.fail(outcome[check], pytrace=False)
