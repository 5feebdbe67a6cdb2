"""What a difference between two variants is worth, seen over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from scipy import stats

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean difference and an interval around it; infinite where one seed alone was compared."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def is_told(self) -> bool:
        """Whether the spread over the seeds leaves no doubt about its sign."""
        return self.low > 0 or self.high < 0


def paired_difference(
    values: Mapping[int, float], others: Mapping[int, float], comparisons: int
) -> Difference:
    """``values - others`` by seed, for runs that share a seed's weights and crops.

    Student's interval for the mean of the differences, so wide that all of ``comparisons``
    intervals together hold in 95 % of all studies (Bonferroni).

    Raises:
        ValueError: no seed in common.
    """
    found = [values[seed] - others[seed] for seed in sorted(values) if seed in others]
    if not found:
        raise ValueError("no seed in common")
    mean = statistics.fmean(found)
    if len(found) < 2 or not all(map(math.isfinite, found)):
        return Difference(mean, -math.inf, math.inf, len(found))
    quantile = stats.t.ppf(1 - (1 - LEVEL) / (2 * comparisons), len(found) - 1)
    half = quantile * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(mean, mean - half, mean + half, len(found))


def spread(values: Mapping[int, float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is not a number for a single seed."""
    found = list(values.values())
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan
