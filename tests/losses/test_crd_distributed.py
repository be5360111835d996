"""CRD over two processes: ranks_crd.py holds the checks, each a test here."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.ddp

CHECKS = Path(__file__).with_name("ranks_crd.py")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, str]:
    return ranks.run(CHECKS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", ranks.names(CHECKS))
def test_over_ranks(outcome, check) -> None:
    if outcome[check]:
        pytest.fail(outcome[check], pytrace=False)
