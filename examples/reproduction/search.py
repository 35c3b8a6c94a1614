"""A default by successive halving: every reading of what the paper leaves open, on held-out training images.

Each candidate trains at the learning rate and weight decay at which the *bare* host does best, so that none is chosen
for acting like a larger step. All train for a few epochs on every case, the best third by mean difference from the bare
host for longer, and so on (Jamieson and Talwalkar, arXiv:1502.07943); the test set plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from reproduction.arms import BARE, Arm
from reproduction.protocol import TUNING_SEED, Case, Lines, Study

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reproduction.runs import Run

__all__ = ["Search"]

ETA = 3
"""One candidate in so many reaches the next rung."""


@dataclass(frozen=True)
class Search:
    """Candidates on some cases; ``rungs`` are the epochs that those who reach each one train for."""

    cases: Sequence[Case]
    candidates: Mapping[str, Arm]
    rungs: Sequence[int]
    compiled: bool = True

    @property
    def bare(self) -> Study:
        """Where the learning rate and the decay come from."""
        return Study(self.cases, {BARE: Arm()}, 0, self.compiled)

    def _run(self, case: Case, arm: str, epochs: int, lines: Lines) -> Run | None:
        best = self.bare.setting(case, BARE, lines)
        if best is None or not self.bare.is_tuned(case, BARE, lines):
            return None
        study = Study(self.cases, {BARE: Arm(), **self.candidates}, 0, self.compiled)
        return study.run(case, arm, *best, epochs, TUNING_SEED, "validation")

    def runs(self, rung: int, lines: Lines) -> dict[str, list[Run]]:
        """Those of a rung by arm, with the bare host; empty while the rung before is unfinished."""
        found: dict[str, list[Run]] = {}
        for arm in (BARE, *self.survivors(rung, lines)):
            runs = [self._run(case, arm, self.rungs[rung], lines) for case in self.cases]
            found[arm] = [run for run in runs if run is not None]
        complete = len(found) > 1 and all(len(runs) == len(self.cases) for runs in found.values())
        return found if complete else {}

    def survivors(self, rung: int, lines: Lines) -> list[str]:
        """The candidates that reach a rung, best first; none while the rung before is unfinished."""
        if rung == 0:
            return list(self.candidates)
        before = self.runs(rung - 1, lines)
        if not before or not all(lines.done(runs) for runs in before.values()):
            return []
        gains = {arm: self.gain(runs, before[BARE], lines) for arm, runs in before.items() if arm != BARE}
        return sorted(gains, key=gains.__getitem__, reverse=True)[: self._places(rung)]

    def _places(self, rung: int) -> int:
        return max(1, int(len(self.candidates) / ETA**rung))

    @staticmethod
    def gain(mine: Sequence[Run], bare: Sequence[Run], lines: Lines) -> float:
        """Mean difference in accuracy over the cases."""
        return mean(lines.accuracy(m) - lines.accuracy(b) for m, b in zip(mine, bare, strict=True))

    def missing(self, lines: Lines) -> list[Run]:
        """What can run now."""
        wanted = self.bare.missing(lines)
        for rung in range(len(self.rungs)):
            wanted += [run for runs in self.runs(rung, lines).values() for run in runs]
        return [run for run in wanted if run not in lines]

    def epochs_left(self, lines: Lines) -> int:
        """Of everything, with what has yet to be decided."""
        left = self.bare.epochs_left(lines)
        for rung, epochs in enumerate(self.rungs):
            done = sum(run in lines for runs in self.runs(rung, lines).values() for run in runs)
            left += epochs * ((self._places(rung) + 1) * len(self.cases) - done)
        return left
