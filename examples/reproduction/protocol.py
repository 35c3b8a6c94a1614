"""Which runs a comparison needs next, given the lines so far.

Protocol, the same for every arm: the learning rate and the weight decay come from the same grid, by accuracy on
held-out training images. The whole grid trains at a short schedule, which favours large steps; so the best learning
rates, each with its best decay, train at the full one, then the winner's neighbours, and so on until no neighbour is
better. Fresh seeds with the winner train on all training images and are read on the test set, after the last epoch.

An arm may take another one's settings instead (``Arm.tuned_as``): all radii of Table I train alike, and an ablation
asks what a part of one arm does, all else equal.
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

__all__ = ["Case", "Lines", "Study"]

TUNING_SEED = 1000
"""Of tuning runs; fresh seeds count from 0."""


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
        return self.arms[arm].tuned_as or arm

    def run(self, case: Case, arm: str, lr: float, decay: float, epochs: int, seed: int, split: Split) -> Run:
        """One run of this study."""
        task = case.task
        chosen = self.arms.get(arm) or ARMS[arm]
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

    def grid(self, case: Case, arm: str) -> list[Run]:
        """The first tuning round; empty where there is nothing to choose."""
        points, epochs = case.task.grid, case.task.short_epochs
        if len(points) == 1:
            return []
        return [self.run(case, arm, lr, decay, epochs, TUNING_SEED, "validation") for lr, decay in points]

    def finals(self, case: Case, arm: str, lines: Lines) -> list[Run]:
        """The second tuning round as far as it is known, and all else of its length that has run.

        Empty while the first is unfinished. Once all has run, the neighbours of the best, which have yet to: so the
        walk takes a step whenever this is asked anew.
        """
        grid = self.grid(case, arm)
        if not grid or not lines.done(grid):
            return []

        def whole(point: tuple[float, float]) -> Run:
            return self.run(case, arm, *point, case.task.epochs, TUNING_SEED, "validation")

        by_rate: dict[float, tuple[float, float]] = {}
        for run in sorted(grid, key=lines.accuracy, reverse=True):
            by_rate.setdefault(run.recipe.lr, (run.recipe.lr, run.recipe.weight_decay))
        found = {point: whole(point) for point in list(by_rate.values())[: case.task.finalists]}
        found |= {point: run for point in case.task.reachable if (run := whole(point)) in lines}
        if lines.done(found.values()):
            top = max(found, key=lambda point: lines.accuracy(found[point]))
            found |= {point: whole(point) for point in case.task.neighbours(*top) if point not in found}
        return list(found.values())

    def is_tuned(self, case: Case, arm: str, lines: Lines) -> bool:
        """Whether tuning has nothing more to ask."""
        arm = self.tuned_as(arm)
        finals = self.finals(case, arm, lines)
        return not self.grid(case, arm) or (bool(finals) and lines.done(finals))

    def setting(self, case: Case, arm: str, lines: Lines) -> tuple[float, float] | None:
        """Learning rate and decay that win the tuning, or lead it so far; None before a run of the full length."""
        arm = self.tuned_as(arm)
        if not self.grid(case, arm):
            return case.task.grid[0]
        done = [run for run in self.finals(case, arm, lines) if run in lines]
        if not done:
            return None
        best = max(done, key=lines.accuracy)
        return best.recipe.lr, best.recipe.weight_decay

    def fresh(self, case: Case, arm: str, lines: Lines) -> list[Run]:
        """The runs on the test set at this setting."""
        setting = self.setting(case, arm, lines)
        if setting is None:
            return []
        return [self.run(case, arm, *setting, case.task.epochs, seed, "test") for seed in range(self.seeds)]

    def missing(self, lines: Lines) -> list[Run]:
        """What can run now: tuning before fresh seeds, and of these one seed of every arm before the next."""
        grids = [run for pair in self.tuned_pairs for run in self.grid(*pair)]
        finals = [run for pair in self.tuned_pairs for run in self.finals(*pair, lines)]
        fresh = [run for pair in self.pairs if self.is_tuned(*pair, lines) for run in self.fresh(*pair, lines)]
        fresh.sort(key=lambda run: run.recipe.seed)
        return [run for run in (*grids, *finals, *fresh) if run not in lines]

    def epochs_left(self, lines: Lines) -> int:
        """Of everything that is known to be needed; tuning may ask for more neighbours."""
        missing = self.missing(lines)
        left = sum(run.recipe.epochs for run in missing)
        for case, arm in self.tuned_pairs:
            if self.grid(case, arm) and not self.finals(case, arm, lines):
                left += min(case.task.finalists, len(case.task.learning_rates)) * case.task.epochs
        for case, arm in self.pairs:
            if not self.is_tuned(case, arm, lines):
                left += self.seeds * case.task.epochs
        return left
