"""Which runs an experiment needs next, given the lines so far.

Protocol, the same for every arm: the learning rate and the weight decay come from the same grid, by accuracy on
held-out training images; the whole grid at a short schedule first, then its best points at the full one. Fresh seeds
with the winner then train on all training images and are read on the test set, after the last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from reproduction.runs import Run, Split, key_of
from training import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from reproduction.presets import Preset

__all__ = ["Lines", "Study"]

TUNING_SEED = 1000
"""Of tuning runs; fresh seeds count from 0."""


class Lines:
    """Finished runs by configuration."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._by_key = {key_of(line["config"]): line for line in lines}

    def __contains__(self, run: Run) -> bool:
        return run.key in self._by_key

    def of(self, run: Run) -> Mapping[str, Any]:
        """The line of a finished run."""
        return self._by_key[run.key]

    def accuracy(self, run: Run) -> float:
        """After the last epoch, when the learning rate has come down; 0 for a run that diverged."""
        line = self.of(run)
        accuracy: float = 0.0 if "diverged" in line else line["accuracy"][-1]
        return accuracy

    def done(self, runs: Iterable[Run]) -> bool:
        """Whether all of them have finished."""
        return all(run in self for run in runs)


@dataclass(frozen=True)
class Study:
    """Some arms on some hosts at one preset."""

    preset: Preset
    hosts: Sequence[str]
    arms: Mapping[str, dict[str, Any] | None]
    seeds: int

    def run(self, host: str, arm: str, lr: float, decay: float, epochs: int, seed: int, split: Split) -> Run:
        """One run of this study."""
        p = self.preset
        recipe = Recipe(epochs, p.batch_size, lr, weight_decay=decay, seed=seed)
        return Run(host, arm, self.arms[arm], recipe, p.arch, p.size, split, p.limit, p.compiled)

    def grid(self, host: str, arm: str) -> list[Run]:
        """The first tuning round."""
        p = self.preset
        points = product(p.learning_rates, p.weight_decays)
        return [self.run(host, arm, lr, wd, p.short_epochs, TUNING_SEED, "validation") for lr, wd in points]

    def finals(self, host: str, arm: str, lines: Lines) -> list[Run]:
        """The second tuning round; empty while the first is unfinished."""
        grid = self.grid(host, arm)
        if not lines.done(grid):
            return []
        best = sorted(grid, key=lines.accuracy, reverse=True)[: self.preset.finalists]
        return [
            self.run(host, arm, r.recipe.lr, r.recipe.weight_decay, self.preset.epochs, TUNING_SEED, "validation")
            for r in best
        ]

    def tuned(self, host: str, arm: str, lines: Lines) -> Run | None:
        """The winner of the tuning; None while it is unfinished."""
        finals = self.finals(host, arm, lines)
        return max(finals, key=lines.accuracy) if finals and lines.done(finals) else None

    def fresh(self, host: str, arm: str, lines: Lines) -> list[Run]:
        """The runs on the test set; empty while tuning is unfinished."""
        best = self.tuned(host, arm, lines)
        if best is None:
            return []
        lr, decay = best.recipe.lr, best.recipe.weight_decay
        return [self.run(host, arm, lr, decay, self.preset.epochs, seed, "test") for seed in range(self.seeds)]

    def missing(self, lines: Lines) -> list[Run]:
        """What can run now: tuning before fresh seeds, and of these one seed of every arm before the next."""
        pairs = [(host, arm) for arm in self.arms for host in self.hosts]
        grids = [run for pair in pairs for run in self.grid(*pair)]
        finals = [run for pair in pairs for run in self.finals(*pair, lines)]
        fresh = sorted((run for pair in pairs for run in self.fresh(*pair, lines)), key=lambda run: run.recipe.seed)
        return [run for run in (*grids, *finals, *fresh) if run not in lines]

    def epochs_left(self, lines: Lines) -> int:
        """Of everything, with what the tuning has yet to decide."""
        p, arms = self.preset, len(self.arms) * len(self.hosts)
        total = arms * (len(p.learning_rates) * len(p.weight_decays) * p.short_epochs)
        total += arms * (p.finalists + self.seeds) * p.epochs
        pairs = [(host, arm) for arm in self.arms for host in self.hosts]
        known = [
            run for pair in pairs for run in (*self.grid(*pair), *self.finals(*pair, lines), *self.fresh(*pair, lines))
        ]
        return total - sum(run.recipe.epochs for run in known if run in lines)
