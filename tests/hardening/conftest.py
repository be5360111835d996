"""Hardening: how many cases, from which seed, and a count of what was tried (``make harden`` makes a page of it)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests; appended, so it shadows nothing


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Adds the count of this process to the file that ``XDFAST_HARDEN_TALLY`` names."""
    from hardening_tally import TALLY

    target = os.environ.get("XDFAST_HARDEN_TALLY")
    if target and TALLY:
        rows = [{"part": part, "name": name, "outcome": what, "cases": n} for (part, name, what), n in TALLY.items()]
        Path(target).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
