"""Paired differences: mean, intervals, and how many seeds would decide."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LEVEL", "Difference", "paired"]

LEVEL = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """Of one arm from another over the same seeds, in the unit of what was compared."""

    mean: float
    std: float
    """Of the differences; NaN for one seed."""
    count: int
    bootstrap_low: float
    """Of the 95 % percentile bootstrap interval; NaN for one seed."""
    bootstrap_high: float

    def interval(self, level: float) -> tuple[float, float]:
        """The t interval of this level, such as 1 - 0.05 / n for n comparisons (Bonferroni); NaN for one seed."""
        if self.count == 1:
            return math.nan, math.nan
        half = float(stats.t.ppf(0.5 + level / 2, self.count - 1)) * self.std / math.sqrt(self.count)
        return self.mean - half, self.mean + half

    @property
    def low(self) -> float:
        """Of the 95 % t interval."""
        return self.interval(LEVEL)[0]

    @property
    def high(self) -> float:
        """Of the 95 % t interval."""
        return self.interval(LEVEL)[1]

    @property
    def decided(self) -> bool:
        """Whether the t interval lies clear of zero."""
        return self.low > 0 or self.high < 0

    @property
    def seeds_needed(self) -> int | None:
        """Pairs with which a t test would find a difference of this size in 4 of 5 studies; None if that is unknown."""
        if not (self.std > 0 and self.mean):
            return None
        count = 2
        while count < 10_000:
            # power of the two-sided t test at a true effect of mean / std
            shift = abs(self.mean) / self.std * math.sqrt(count)
            critical = stats.t.ppf(0.5 + LEVEL / 2, count - 1)
            if 1 - stats.nct.cdf(critical, count - 1, shift) >= POWER:
                return count
            count += max(1, count // 20)
        return None


def paired(mine: Sequence[float], other: Sequence[float]) -> Difference:
    """``mine`` − ``other``, entry by entry; at least one pair."""
    differences = np.asarray(mine, dtype=float) - np.asarray(other, dtype=float)
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return Difference(mean, math.nan, 1, math.nan, math.nan)
    std = float(differences.std(ddof=1))
    if std == 0:
        return Difference(mean, 0.0, count, mean, mean)
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Difference(mean, std, count, float(interval.low), float(interval.high))
