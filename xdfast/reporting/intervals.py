"""The confidence interval of a success rate."""

from __future__ import annotations

import math

__all__ = ["wilson_interval"]


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate of successes, both ends in [0, 1].

    ``(p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)`` (Wilson, JASA 22, 1927). Unlike p̂ ± z·σ it is sensible for few
    trials and for rates of 0 and 1.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 ≤ successes ≤ trials and trials ≥ 1, got {successes} of {trials}")
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    rate = successes / trials
    middle = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    whole = 1 + z * z / trials
    # rounding must not put an end past the rate itself
    return max(0.0, min(rate, (middle - half) / whole)), min(1.0, max(rate, (middle + half) / whole))
