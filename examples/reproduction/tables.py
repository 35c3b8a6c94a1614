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

    from reproduction.protocol import Case, Lines, Setting, Study
    from reproduction.search import Search

__all__ = ["accuracies", "comparison_table", "difference", "finished", "search_table", "tuning_table"]


_STEADIER = 5
"""Epochs of a second reading, less noisy than the last epoch alone."""

_NOTE = (
    "Differences are paired by seed. Their intervals are over training seeds, at the settings that tuning chose, on "
    "one test set. With few seeds the bootstrap's are too narrow: trust the t interval. What they leave out: tuning "
    "reads few seeds on 5,000 images, each reading with a standard error of 0.7 points or so, so other tuning seeds "
    "might have chosen other settings; *so far* means that tuning has not ended. The seeds that would decide are those "
    "of a new study, fixed beforehand; adding seeds until an interval lies clear of zero finds what is not there.\n\n"
    "± is the standard deviation over seeds. *Flipped*: share of binary weights that differ from the initial ones. "
    "*Oscillating late*: share that changes at least twice within an epoch, mean over the last quarter of training. "
    "*Reach*: √r‖p‖ of the furthest point, 1 at the ball's edge. Arms: *bare*, the host alone; *HBNN*, the paper's "
    "rule; *HBNN, spectral*, the library's default; *√lr*, the default before it; *Euclidean*, without curvature."
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
    together = "for all hosts together (Bonferroni)"
    header = [
        *("task, host", "arm", "lr, decay", "test accuracy, % (seeds)", "seed by seed"),
        *(f"difference from {study.reference}, points", "95 % t interval", together),
        *("95 % bootstrap", "seeds that would decide"),
        f"mean of the last {_STEADIER} epochs, 95 % t interval",
        *("training loss", "flipped", "oscillating late", "reach"),
    ]
    rows = [[case, arm, *_cells(study, case, arm, lines)] for case in study.cases for arm in study.arms]
    if len(study.cases) == 1:  # it repeats the one before
        place = header.index(together)
        header, rows = header[:place] + header[place + 1 :], [row[:place] + row[place + 1 :] for row in rows]
    return f"{table(header, rows)}\n\n{_NOTE}"


def _cells(study: Study, case: Case, arm: str, lines: Lines) -> list[str]:
    best, found = study.setting(case, arm, lines), accuracies(study, case, arm, lines)
    setting = f"{best[0]:g}, {best[1]:g}" if best else "not tuned yet"
    if best and not study.is_tuned(case, arm, lines):
        setting += ", so far"
    if study.given:
        setting += ", given"
    elif (tuned_as := study.tuned_as(arm)) != arm:
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
    """Accuracy in % on held-out training images by setting, one reading a tuning seed; one table a case."""
    return "\n\n".join(filter(None, (_tuning(study, case, lines) for case in study.cases)))


def _tuning(study: Study, case: Case, lines: Lines) -> str:
    tuned = [arm for of, arm in study.tuned_pairs if of == case]
    readings = {arm: found for arm in tuned if (found := study.readings(case, arm, lines))}
    if not readings:
        return ""
    best = {arm: study.setting(case, arm, lines) for arm in readings}

    def cell(arm: str, setting: Setting) -> str:
        found = [f"{100 * x:.1f}" if x else "diverged" for x in readings[arm].get(setting, [])]
        return f"**{', '.join(found)}**" if setting == best[arm] else ", ".join(found)

    cells = {setting: [cell(arm, setting) for arm in readings] for setting in case.task.reachable}
    rows = [[f"{lr:g}, {decay:g}", *row] for (lr, decay), row in cells.items() if any(row)]
    if BARE in readings and len(readings) > 1:
        shared = [_at_the_same_settings(readings[arm], readings[BARE]) for arm in readings if arm != BARE]
        rows.append([f"mean difference from {BARE} at the same settings", "", *shared])
    return table([f"{case}: lr, decay", *readings], rows)


def _at_the_same_settings(mine: Mapping[Setting, list[float]], other: Mapping[Setting, list[float]]) -> str:
    """With the first tuning seed, where neither diverged: what a host gains that is not tuned anew."""
    gains = [100 * (mine[s][0] - other[s][0]) for s in mine.keys() & other.keys() if mine[s][0] and other[s][0]]
    return f"{statistics.mean(gains):+.1f}, {sum(gain > 0 for gain in gains)} of {len(gains)} above" if gains else ""


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
