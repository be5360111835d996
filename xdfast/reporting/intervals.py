"""Confidence intervals of success rates and of their differences."""

from __future__ import annotations

import math

__all__ = ["newcombe_interval", "paired_interval", "wilson_interval"]


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


def newcombe_interval(a: int, n: int, b: int, m: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Interval of the difference a/n − b/m of two independent rates (Newcombe, Statistics in Medicine 17, 1998, 873, method 10).

    .. math:: d - \sqrt{(p_a - l_a)^2 + (u_b - p_b)^2}, \quad d + \sqrt{(u_a - p_a)^2 + (p_b - l_b)^2}

    with Wilson's intervals [l, u] of each rate.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    return _square_and_add(
        a / max(n, 1), b / max(m, 1), wilson_interval(a, n, confidence), wilson_interval(b, m, confidence), 0
    )


def paired_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    r"""Interval of the difference of two rates of the same trials (Newcombe, Statistics in Medicine 17, 1998, 2635, method 10).

    As :func:`newcombe_interval`, less the part that the two have in common: each root is of
    :math:`x^2 - 2 \varphi x y + y^2`, φ the correlation of the outcomes (corrected for continuity where it is positive).

    Args:
        both: trials in which both succeed.
        only_first: the first alone.
        only_second: the second alone.
        neither: none.
        confidence: of the interval.

    Raises:
        ValueError: a negative count, or no trials.
    """
    counts = (both, only_first, only_second, neither)
    trials = sum(counts)
    if min(counts) < 0 or trials < 1:
        raise ValueError(f"expected counts ≥ 0 of at least one trial, got {counts}")
    first, second = both + only_first, both + only_second
    product = first * (trials - first) * second * (trials - second)
    cross = both * neither - only_first * only_second
    phi = 0.0
    if product:
        phi = (max(cross - trials / 2, 0.0) if cross > 0 else float(cross)) / math.sqrt(product)
    of_first, of_second = (wilson_interval(count, trials, confidence) for count in (first, second))
    return _square_and_add(first / trials, second / trials, of_first, of_second, phi)


def _square_and_add(
    p: float, q: float, of_p: tuple[float, float], of_q: tuple[float, float], phi: float
) -> tuple[float, float]:
    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = p - q - distance(p - of_p[0], of_q[1] - q)
    high = p - q + distance(of_p[1] - p, q - of_q[0])
    return max(-1.0, low), min(1.0, high)
