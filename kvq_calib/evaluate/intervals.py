"""How sure a figure is: intervals of proportions and of their differences, standard errors of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["Interval", "mean_and_error", "paired_difference", "wilson"]

Interval = tuple[float, float]
"""Lower and upper end."""

#: Of every interval.
CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(successes: int, trials: int) -> Interval:
    """The 95% confidence interval of a proportion (Wilson 1927), within ``[0, 1]``.

    Unlike the normal approximation it has a width where all trials succeed or fail, so it suits few trials.
    """
    share, z2 = successes / trials, _Z**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, Interval]:
    """How much larger the share of successes is in ``after``, trial for trial the same as in ``before``.

    The 95% confidence interval is the hybrid score interval of Newcombe (1998, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", method 10): Wilson's ends of both shares, drawn
    together as far as the trials agree. A correction for continuity keeps it wide where few trials all agree.

    Returns:
        Difference of the shares and its interval, within ``[-1, 1]``.
    """
    n = len(before)
    both = sum(a and b for a, b in zip(before, after, strict=True))
    lost, gained = sum(before) - both, sum(after) - both
    neither = n - both - lost - gained
    shares = (sum(after) / n, sum(before) / n)
    (low_a, high_a), (low_b, high_b) = wilson(sum(after), n), wilson(sum(before), n)
    product = math.prod((both + lost, gained + neither, both + gained, lost + neither))
    agreeing = float(both * neither - lost * gained)
    if agreeing > 0:
        agreeing = max(agreeing - n / 2, 0.0)
    phi = agreeing / math.sqrt(product) if product else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(up**2 - 2 * phi * up * down + down**2, 0.0))

    difference = shares[0] - shares[1]
    below = reach(shares[0] - low_a, high_b - shares[1])
    above = reach(high_a - shares[0], shares[1] - low_b)
    return difference, (difference - below, difference + above)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error; ``None`` for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
