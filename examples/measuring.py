"""Times that can be compared: what is compared runs in turns in one process, and ratios are taken within a turn.

Machines are noisy, above all virtual ones; a turn's arms share its noise. So a figure is the median over the turns, of
a time or of a ratio of two times of the same turn, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Estimate", "in_turns", "median", "ratio"]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % percentile bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def as_dict(self) -> dict[str, float]:
        """As it stands in a line."""
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


def in_turns(arms: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every arm in every turn: A B C A B C ..., after ``warm_up`` turns that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + turns):
        for name, arm in arms.items():
            _wait()
            start = time.perf_counter()
            arm()
            _wait()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> Estimate:
    """Of at least two values."""
    found = stats.bootstrap(
        (np.asarray(values),), np.median, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(float(np.median(values)), float(found.low), float(found.high))


def ratio(mine: Sequence[float], other: Sequence[float]) -> Estimate:
    """Of ``mine`` to ``other``, turn by turn."""
    return median([a / b for a, b in zip(mine, other)])
