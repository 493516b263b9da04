"""What a few seeds tell: Student-t intervals, paired differences, and p-values for all of them.

Every value here is of one run; they differ in the seed alone. With n values there are n - 1 degrees
of freedom; a single one has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over `count` seeds, give or take `half_width` (95 %); None with a single seed."""

    value: float
    half_width: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired difference over `count` seeds; `p` of a t-test against none, two-sided, and `p_holm`
    where it is adjusted for the other comparisons."""

    value: float
    half_width: float | None
    p: float | None
    count: int
    p_holm: float | None = None


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and its Student-t interval: half width t(0.975, n - 1) s / sqrt(n)."""
    from scipy.stats import t

    count, half_width = len(values), None
    if count > 1:
        error = stdev(values) / math.sqrt(count)
        half_width = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Mean(value=fmean(values), half_width=half_width, count=count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Of what two variants reached with the same seed; None where they share no seed."""
    from scipy.stats import t

    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    mean, p = mean_of(differences), None
    if mean.half_width is not None:
        error = stdev(differences) / math.sqrt(mean.count)
        if error:
            p = 2 * float(t.sf(abs(mean.value) / error, mean.count - 1))
        else:  # all alike: none at all, or one that no seed disputes
            p = 0.0 if mean.value else 1.0
    return Difference(value=mean.value, half_width=mean.half_width, p=p, count=mean.count)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for there being several (Holm 1979), by name.

    The i-th smallest of m is multiplied by m + 1 - i; none falls below a smaller one's, or above 1.
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    for number, name in enumerate(sorted(ps, key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - number) * ps[name]))
        adjusted[name] = least
    return adjusted
