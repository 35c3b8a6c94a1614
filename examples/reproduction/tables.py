"""Markdown tables from the lines alone."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from markdown_tables import table
from reproduction.arms import BARE
from reproduction.statistics import LEVEL, Difference, paired

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from reproduction.protocol import Case, Lines, Study
    from reproduction.search import Search

__all__ = ["accuracies", "comparison_table", "difference", "finished", "search_table", "tuning_table"]


_STEADIER = 5
"""Epochs of a second reading, less noisy than the last epoch alone."""

_NOTE = (
    "Differences are paired by seed. Their intervals are over training seeds, at the settings that tuning chose on one "
    "seed, on one test set. With few seeds the bootstrap's are too narrow: trust the t interval. What they leave out: "
    "tuning reads one seed on 5,000 images, each time with a standard error of 0.7 points or so, so another tuning "
    "seed might have chosen other settings. The seeds that would decide are those of a new study, fixed beforehand; to "
    "add seeds until an interval lies clear of zero finds differences that are none."
)


def finished(study: Study, case: Case, arm: str, lines: Lines) -> list[Mapping[str, Any]]:
    """The lines of an arm's fresh seeds, without those that diverged."""
    done = [lines.of(run) for run in study.fresh(case, arm, lines) if run in lines]
    return [line for line in done if "diverged" not in line]


def accuracies(study: Study, case: Case, arm: str, lines: Lines, readout: int | None = None) -> dict[int, float]:
    """Test accuracy in % by fresh seed, mean over the last ``readout`` epochs, or the task's; 0 where it diverged."""
    runs = [run for run in study.fresh(case, arm, lines) if run in lines]
    return {run.recipe.seed: 100 * lines.accuracy(run, readout or case.task.readout) for run in runs}


def difference(study: Study, case: Case, arm: str, lines: Lines, readout: int | None = None) -> Difference | None:
    """From the study's reference over the seeds that both have, in points; None without any."""
    if arm == study.reference or study.reference not in study.arms:
        return None
    mine, other = (accuracies(study, case, name, lines, readout) for name in (arm, study.reference))
    seeds = sorted(mine.keys() & other.keys())
    return paired([mine[s] for s in seeds], [other[s] for s in seeds]) if seeds else None


def comparison_table(study: Study, lines: Lines) -> str:
    """Test accuracy of every arm, and its paired difference from the study's reference."""
    header = [
        *("task, host", "arm", "lr, decay", "test accuracy, % (seeds)", "seed by seed", f"− {study.reference}, points"),
        *("95 % t interval", "for all hosts together (Bonferroni)"),
        *("95 % bootstrap", "seeds that would decide"),
        f"mean of the last {_STEADIER} epochs, 95 % t interval",
        *("training loss", "flipped", "oscillating late", "reach"),
    ]
    rows = [[case, arm, *_cells(study, case, arm, lines)] for case in study.cases for arm in study.arms]
    return f"{table(header, rows)}\n\n{_NOTE}"


def _cells(study: Study, case: Case, arm: str, lines: Lines) -> list[str]:
    best, found = study.setting(case, arm, lines), accuracies(study, case, arm, lines)
    setting = f"{best[0]:g}, {best[1]:g}" if best else "not tuned yet"
    if best and not study.is_tuned(case, arm, lines):
        setting += ", so far"
    if (tuned_as := study.tuned_as(arm)) != arm:
        setting += f", as {tuned_as}"
    if not found:
        return [setting, *[""] * 12]
    spread = f" ± {statistics.stdev(found.values()):.2f}" if len(found) > 1 else ""
    accuracy = f"{statistics.mean(found.values()):.2f}{spread} ({len(found)})"
    steadier = _difference_cells(difference(study, case, arm, lines, _STEADIER), 1)[:2]
    cells = [
        setting,
        accuracy,
        ", ".join(f"{found[seed]:.2f}" for seed in sorted(found)),
        *_difference_cells(difference(study, case, arm, lines), len(study.cases)),
        ", ".join(filter(None, steadier)),
    ]
    done = finished(study, case, arm, lines)
    if not done:
        return [*cells, "", "", "", ""]
    reach = [line["reach"] for line in done if "reach" in line]
    return [
        *cells,
        f"{statistics.mean(line['train_loss'][-1] for line in done):.3f}",
        f"{100 * statistics.mean(line['flip_ratio'][-1] for line in done):.1f} %",
        f"{100 * statistics.mean(map(_late_oscillation, done)):.2f} %",
        f"{statistics.mean(reach):.3f}" if reach else "",
    ]


def _late_oscillation(line: Mapping[str, Any]) -> float:
    """Over the last quarter of the epochs."""
    ratios: list[float] = line["oscillation"]
    return statistics.mean(ratios[-max(1, len(ratios) // 4) :])


def _difference_cells(d: Difference | None, comparisons: int) -> list[str]:
    if d is None:
        return [""] * 5
    if d.count == 1:
        return [f"{d.mean:+.2f} (1)", "", "", "", ""]
    low, high = d.interval(1 - (1 - LEVEL) / comparisons)
    needed = "decided" if d.decided else str(d.seeds_needed or "> 10,000")
    return [
        f"{d.mean:+.2f} ({d.count})",
        f"{d.low:+.2f} … {d.high:+.2f}",
        f"{low:+.2f} … {high:+.2f}",
        f"{d.bootstrap_low:+.2f} … {d.bootstrap_high:+.2f}",
        needed,
    ]


def tuning_table(study: Study, lines: Lines) -> str:
    """Accuracy in % on held-out training images over the grid, short round → full length; one table a case."""
    return "\n\n".join(_tuning(study, case, lines) for case in study.cases if len(case.task.grid) > 1)


def _tuning(study: Study, case: Case, lines: Lines) -> str:
    tuned = [arm for of, arm in study.tuned_pairs if of == case]
    arms = [arm for arm in tuned if any(run in lines for run in study.grid(case, arm))]
    points = {point: [_tuned(study, case, arm, point, lines) for arm in arms] for point in case.task.reachable}
    rows = [[f"{lr:g}, {decay:g}", *cells] for (lr, decay), cells in points.items() if any(cells)]
    return table([f"{case}: lr, decay", *arms], rows)


def _tuned(study: Study, case: Case, arm: str, point: tuple[float, float], lines: Lines) -> str:
    rounds = ("", study.grid(case, arm)), ("→ ", study.finals(case, arm, lines))
    found = [
        arrow + ("diverged" if "diverged" in lines.of(run) else f"{100 * lines.accuracy(run):.1f}")
        for arrow, runs in rounds
        for run in runs
        if run in lines and (run.recipe.lr, run.recipe.weight_decay) == point
    ]
    return " ".join(found)


def search_table(search: Search, lines: Lines) -> str:
    """Difference in points from the bare host, on held-out training images, mean over the cases, by rung."""
    rungs = [search.runs(i, lines) for i in range(len(search.rungs))]
    names = [f"{epochs} epochs: {part}" for epochs in search.rungs for part in ("− bare", *map(str, search.cases))]
    rows = []
    for arm in (BARE, *search.candidates):
        cells = []
        for runs in rungs:
            mine, bare = runs.get(arm, []), runs.get(BARE, [])
            known = bool(mine) and lines.done([*mine, *bare])
            gain = f"{100 * search.gain(mine, bare, lines):+.2f}" if known and arm != BARE else ""
            cells += [gain, *(f"{100 * lines.accuracy(run):.2f}" if run in lines else "" for run in mine)]
            cells += [""] * (len(search.cases) - len(mine))
        rows.append([arm, *cells])
    return table(["candidate", *names], rows)
