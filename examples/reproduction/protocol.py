"""Which runs a comparison needs next, given the lines so far.

Protocol, the same for every arm: the learning rate and the weight decay come from the same grid, by accuracy on
held-out training images. The whole grid trains with one seed, then the winner's neighbours beyond it, and so on until
no neighbour is better. Then the best few train with further seeds, and the best mean wins: one seed cannot tell them
apart. Fresh seeds with the winner train on all training images and are read on the test set, after the last epoch.
Shorter schedules play no part: they favour large steps.

An arm may take another one's settings instead (``Arm.tuned_as``): all radii of Table I train alike, and an ablation
asks what a part of one arm does, all else equal. Or all take settings that are given, and nothing is tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from reproduction.arms import ARMS, BARE
from reproduction.runs import Run, Split, key_of
from training import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from reproduction.arms import Arm
    from reproduction.presets import Task

__all__ = ["Case", "Lines", "Setting", "Study"]

TUNING_SEED = 1000
"""Of the first tuning runs, the others count from there; fresh seeds count from 0."""

Setting = tuple[float, float]
"""Learning rate and weight decay."""


@dataclass(frozen=True)
class Case:
    """A host on a task."""

    task: Task
    host: str

    def __str__(self) -> str:
        return f"{self.task}, {self.host}"


class Lines:
    """Finished runs by configuration."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._by_key = {key_of(line["config"]): line for line in lines}

    def __contains__(self, run: Run) -> bool:
        return run.key in self._by_key

    def of(self, run: Run) -> Mapping[str, Any]:
        """The line of a finished run."""
        return self._by_key[run.key]

    def accuracy(self, run: Run, readout: int = 1) -> float:
        """The mean over the last ``readout`` epochs, where the learning rate has come down; 0 for a diverged run."""
        line = self.of(run)
        return 0.0 if "diverged" in line else mean(line["accuracy"][-readout:])

    def done(self, runs: Iterable[Run]) -> bool:
        """Whether all of them have finished."""
        return all(run in self for run in runs)


@dataclass(frozen=True)
class Study:
    """Some arms on some cases."""

    cases: Sequence[Case]
    arms: Mapping[str, Arm]
    seeds: int
    compiled: bool = True
    reference: str = BARE
    """The arm that the others are compared with."""
    given: Setting | None = None
    """Of all arms, in place of tuning."""

    @property
    def pairs(self) -> list[tuple[Case, str]]:
        """All (case, arm)."""
        return [(case, arm) for arm in self.arms for case in self.cases]

    @property
    def tuned_pairs(self) -> list[tuple[Case, str]]:
        """Those that are tuned; among them may be arms that are not compared."""
        return list(dict.fromkeys((case, self.tuned_as(arm)) for case, arm in self.pairs))

    def tuned_as(self, arm: str) -> str:
        """The arm whose learning rate and weight decay this one takes: as a rule, itself."""
        return self._arm(arm).tuned_as or arm

    def _arm(self, name: str) -> Arm:
        """Also one that is tuned for another and not compared."""
        return self.arms.get(name) or ARMS[name]

    def run(self, case: Case, arm: str, lr: float, decay: float, epochs: int, seed: int, split: Split) -> Run:
        """One run of this study."""
        task = case.task
        chosen = self._arm(arm)
        recipe = Recipe(epochs, task.batch_size, lr, weight_decay=decay, seed=seed, optimizer=chosen.optimizer)
        return Run(
            case.host,
            arm,
            chosen.options,
            recipe,
            task.dataset,
            task.arch,
            task.size,
            split,
            task.limit,
            self.compiled,
        )

    def first_round(self, case: Case, arm: str, lines: Lines) -> list[Run]:
        """The grid with the first tuning seed, and what else of its reach has run.

        Once all of that has, the neighbours of the best, which have yet to: so the walk takes a step whenever this is
        asked anew. Empty where there is nothing to choose.
        """
        task = case.task
        if self.given or len(task.grid) == 1:
            return []
        found = {setting: self._tuning_run(case, arm, setting) for setting in task.grid}
        found |= {setting: run for setting in task.reachable if (run := self._tuning_run(case, arm, setting)) in lines}
        if lines.done(found.values()):
            top = max(found, key=lambda setting: lines.accuracy(found[setting]))
            found |= {s: self._tuning_run(case, arm, s) for s in task.neighbours(*top) if s not in found}
        return list(found.values())

    def second_round(self, case: Case, arm: str, lines: Lines) -> list[Run]:
        """The finalists with the other tuning seeds; empty while the first round is unfinished."""
        first = self.first_round(case, arm, lines)
        if not lines.done(first):
            return []
        best = sorted(first, key=lines.accuracy, reverse=True)[: case.task.finalists]
        return [
            self._tuning_run(case, arm, (run.recipe.lr, run.recipe.weight_decay), seed)
            for seed in range(1, case.task.tuning_seeds)
            for run in best
        ]

    def _tuning_run(self, case: Case, arm: str, setting: Setting, seed: int = 0) -> Run:
        return self.run(case, arm, *setting, case.task.epochs, TUNING_SEED + seed, "validation")

    def is_tuned(self, case: Case, arm: str, lines: Lines) -> bool:
        """Whether tuning has nothing more to ask."""
        arm = self.tuned_as(arm)
        return all(lines.done(runs(case, arm, lines)) for runs in (self.first_round, self.second_round))

    def readings(self, case: Case, arm: str, lines: Lines) -> dict[Setting, list[float]]:
        """Accuracy on held-out images by setting, one a tuning seed, of what has run."""
        found: dict[Setting, list[float]] = {}
        for run in (*self.first_round(case, arm, lines), *self.second_round(case, arm, lines)):
            if run in lines:
                found.setdefault((run.recipe.lr, run.recipe.weight_decay), []).append(lines.accuracy(run))
        return found

    def setting(self, case: Case, arm: str, lines: Lines) -> Setting | None:
        """Learning rate and decay that are given, or win the tuning, or lead it so far; None before its first run."""
        if self.given:
            return self.given
        arm = self.tuned_as(arm)
        if len(case.task.grid) == 1:
            return case.task.grid[0]
        found = self.readings(case, arm, lines)
        seeds = max(map(len, found.values()), default=0)
        most_read = [setting for setting in found if len(found[setting]) == seeds]
        return max(most_read, key=lambda setting: mean(found[setting]), default=None)

    def fresh(self, case: Case, arm: str, lines: Lines) -> list[Run]:
        """The runs on the test set at this setting."""
        setting = self.setting(case, arm, lines)
        if setting is None:
            return []
        return [self.run(case, arm, *setting, case.task.epochs, seed, "test") for seed in range(self.seeds)]

    def missing(self, lines: Lines) -> list[Run]:
        """What can run now: tuning before fresh seeds, and of these one seed of every arm before the next."""
        first = [run for pair in self.tuned_pairs for run in self.first_round(*pair, lines)]
        second = [run for pair in self.tuned_pairs for run in self.second_round(*pair, lines)]
        fresh = [run for pair in self.pairs if self.is_tuned(*pair, lines) for run in self.fresh(*pair, lines)]
        fresh.sort(key=lambda run: run.recipe.seed)
        return [run for run in (*first, *second, *fresh) if run not in lines]

    def epochs_left(self, lines: Lines) -> int:
        """Of everything that is known to be needed; tuning may ask for more neighbours."""
        left = sum(run.recipe.epochs for run in self.missing(lines))
        for case, arm in self.tuned_pairs:
            task = case.task
            if not lines.done(self.first_round(case, arm, lines)):
                left += min(task.finalists, len(task.grid)) * (task.tuning_seeds - 1) * task.epochs
        for case, arm in self.pairs:
            if not self.is_tuned(case, arm, lines):
                left += self.seeds * case.task.epochs
        return left
