"""What the hardening tests share: the long or the quick form, the seed, and the count of cases.

``XDFAST_HARDEN=long`` is the long form, ``XDFAST_HARDEN_SEED`` its seed. The quick form always tries the same cases.
"""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as from_seed

LONG = os.environ.get("XDFAST_HARDEN") == "long"
SEED = int(os.environ.get("XDFAST_HARDEN_SEED", "0"))

#: (part, name, outcome) → cases.
TALLY: Counter[tuple[str, str, str]] = Counter()


def count(part: str, name: str, outcome: str = "held") -> None:
    """One more case of ``name``. Called after its assertions: what is counted has passed."""
    TALLY[part, name, outcome] += 1


def examples(quick: int, long: int):
    """Decorator: hypothesis' settings for one test. A failing case is reported as it was found in the long form, where
    looking for a smaller one would take longer than the sweep."""
    number = long if LONG else quick
    phases = (Phase.explicit, Phase.generate) if LONG else (Phase.explicit, Phase.generate, Phase.shrink)

    def decorate(test):
        chosen = settings(
            max_examples=number, deadline=None, database=None, derandomize=not LONG, phases=phases,
            suppress_health_check=list(HealthCheck),
        )(test)  # fmt: skip
        return from_seed(SEED)(chosen) if LONG else chosen

    return decorate
