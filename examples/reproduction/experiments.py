"""The paper's experiments: which comparison each one is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reproduction.arms import ARMS, BARE, RADII, SEARCHED
from reproduction.protocol import Case, Study
from reproduction.search import Search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reproduction.presets import Preset
    from reproduction.protocol import Setting

__all__ = ["EXPERIMENTS", "Experiment"]


@dataclass(frozen=True)
class Experiment:
    """What is compared, before a preset says at which size."""

    title: str
    datasets: tuple[str, ...]
    """Those that the preset has; all of the preset's if it has none of them."""
    hosts: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int | None = None
    """Fresh seeds; by default the preset's."""
    ablated: str | None = None
    """Of an ablation: the arm whose tuned learning rate and weight decay all others share."""

    def cases(self, preset: Preset, hosts: Sequence[str] = (), archs: Sequence[str] = ()) -> list[Case]:
        """Every host on every task; ``hosts`` and ``archs`` narrow it. Raises ValueError if nothing is left."""
        tasks = [task for task in preset.tasks if task.dataset in self.datasets] or list(preset.tasks)
        chosen = [task for task in tasks if not archs or task.arch in archs]
        if not chosen:
            raise ValueError(f"no {' or '.join(archs)} in this experiment, which has {', '.join(map(str, tasks))}")
        return [Case(task, host) for task in chosen for host in hosts or self.hosts]

    def study(
        self,
        preset: Preset,
        cases: Sequence[Case],
        arms: Sequence[str] = (),
        seeds: int = 0,
        given: Setting | None = None,
    ) -> Study:
        """Its arms, tuned unless a setting is given, then on fresh seeds; by default all arms and as many seeds as its
        own or the preset's.

        Raises ValueError for an ablation without the arm that it is of.
        """
        chosen = {arm: ARMS[arm] for arm in arms or self.arms}
        if self.ablated:
            if self.ablated not in chosen:
                raise ValueError(f"the arms of this ablation have to contain {self.ablated!r}")
            parts = {name: replace(arm, tuned_as=self.ablated) for name, arm in chosen.items() if name != self.ablated}
            chosen |= parts
        seeds = seeds or self.seeds or preset.seeds
        return Study(cases, chosen, seeds, preset.compiled, self.ablated or BARE, given)

    def search(self, preset: Preset, cases: Sequence[Case], arms: Sequence[str] = ()) -> Search:
        """Its arms by successive halving. Raises ValueError at a preset that has no room for it."""
        if not preset.rungs:
            raise ValueError("a search needs short schedules, which this preset does not have: take small or medium")
        candidates = {arm: ARMS[arm] for arm in arms or self.arms if ARMS[arm].options is not None}
        return Search(cases, candidates, preset.rungs, preset.compiled)


_TABLE5 = (BARE, "HBNN", "HBNN, spectral", "Euclidean", "Euclidean, spectral", "bare, Muon", "SBNN", "fixed point")
_PAPERS = (BARE, "SBNN", "HBNN", "HBNN, spectral")

EXPERIMENTS = {
    "search": Experiment("A default among the open choices", ("cifar10",), ("irnet", "recu"), SEARCHED),
    "ablation": Experiment(
        "What spectral points gain by, all else equal",
        ("cifar10",),
        ("irnet",),
        ("HBNN, spectral", "Euclidean, spectral", "bare, Muon", BARE),
        ablated="HBNN, spectral",
    ),
    "table1": Experiment("Radius", ("cifar100",), ("plain",), (BARE, *RADII)),
    "table2": Experiment(
        "1/1 and 1/32 networks", ("cifar10", "cifar100"), ("plain", "binaryconnect", "mdtanh"), _PAPERS
    ),
    "table5": Experiment(
        "On top of existing methods", ("cifar10", "imagenet"), ("irnet", "recu", "siman", "plain"), _TABLE5
    ),
    "fig3": Experiment("Flips by layer", ("cifar10",), ("plain", "irnet"), _PAPERS),
    "fig4": Experiment("Accuracy over the epochs", ("cifar10",), ("plain", "irnet"), _PAPERS),
    "fig5": Experiment("Loss surfaces", ("cifar10",), ("plain", "irnet"), (BARE, "HBNN", "HBNN, spectral"), seeds=1),
}
