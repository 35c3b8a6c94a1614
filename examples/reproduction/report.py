"""Tables and pictures from the lines alone."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from reproduction.arms import BARE
from reproduction.statistics import Difference, paired

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from reproduction.experiments import Lines, Study
    from reproduction.runs import Run

__all__ = ["difference", "draw_differences", "table", "tuning_table"]


def table(study: Study, lines: Lines) -> str:
    """Test accuracy of every arm, and its paired difference from the bare host (Markdown)."""
    rows = [
        "| host | arm | lr, decay | test accuracy, % | − bare, points | 95 % t interval | bootstrap | seeds that would "
        "decide | flipped | oscillating | reach |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for host in study.hosts:
        rows += ["| " + " | ".join(_row(study, host, arm, lines)) + " |" for arm in study.arms]
    return "\n".join(rows)


def _row(study: Study, host: str, arm: str, lines: Lines) -> list[str]:
    best = study.tuned(host, arm, lines)
    done = [run for run in study.fresh(host, arm, lines) if run in lines]
    if best is None or not done:
        state = "not tuned yet" if best is None else f"{best.recipe.lr:g}, {best.recipe.weight_decay:g}"
        return [host, arm, state, *[""] * 8]
    found = [line for line in map(lines.of, done) if "diverged" not in line]
    accuracies = [100 * lines.accuracy(run) for run in done]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    cells = [host, arm, f"{best.recipe.lr:g}, {best.recipe.weight_decay:g}"]
    cells.append(f"{statistics.mean(accuracies):.2f}{spread} ({len(accuracies)})")
    cells += _difference_cells(difference(study, host, arm, lines))
    reach = [line["reach"] for line in found if "reach" in line]
    if not found:
        return [*cells, "", "", ""]
    cells += [
        f"{100 * statistics.mean(line['flip_ratio'][-1] for line in found):.1f} %",
        f"{100 * statistics.mean(map(_late_oscillation, found)):.2f} %",
        f"{statistics.mean(reach):.3f}" if reach else "",
    ]
    return cells


def _late_oscillation(line: Mapping[str, Any]) -> float:
    """Over the last quarter of the epochs."""
    ratios: list[float] = line["oscillation"]
    return statistics.mean(ratios[-max(1, len(ratios) // 4) :])


def difference(study: Study, host: str, arm: str, lines: Lines) -> Difference | None:
    """From the bare host over the seeds that both have, in points; None without any."""
    if arm == BARE or BARE not in study.arms:
        return None

    def by_seed(arm: str) -> dict[int, Run]:
        return {run.recipe.seed: run for run in study.fresh(host, arm, lines) if run in lines}

    mine, bare = by_seed(arm), by_seed(BARE)
    seeds = sorted(mine.keys() & bare.keys())
    if not seeds:
        return None
    return paired(*([100 * lines.accuracy(runs[seed]) for seed in seeds] for runs in (mine, bare)))


def _difference_cells(d: Difference | None) -> list[str]:
    if d is None:
        return [""] * 4
    if d.count == 1:
        return [f"{d.mean:+.2f} (1)", "", "", ""]
    needed = "decided" if d.decided else str(d.seeds_needed or "> 10,000")
    return [
        f"{d.mean:+.2f} ({d.count})",
        f"{d.low:+.2f} … {d.high:+.2f}",
        f"{d.bootstrap_low:+.2f} … {d.bootstrap_high:+.2f}",
        needed,
    ]


def tuning_table(study: Study, lines: Lines) -> str:
    """Accuracy on held-out training images over the grid, both rounds (Markdown)."""
    points = [(lr, wd) for lr in study.preset.learning_rates for wd in study.preset.weight_decays]
    rows = [
        "| host | arm | " + " | ".join(f"{lr:g}, {wd:g}" for lr, wd in points) + " |",
        "|---|---|" + "---|" * len(points),
    ]
    for host in study.hosts:
        for arm in study.arms:
            final = {(r.recipe.lr, r.recipe.weight_decay): r for r in study.finals(host, arm, lines) if r in lines}
            cells = []
            for run in study.grid(host, arm):
                cell = f"{100 * lines.accuracy(run):.1f}" if run in lines else ""
                longer = final.get((run.recipe.lr, run.recipe.weight_decay))
                cells.append(cell + (f" → {100 * lines.accuracy(longer):.1f}" if longer else ""))
            rows.append(f"| {host} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw_differences(study: Study, lines: Lines, path: Path) -> None:
    """Each arm's paired difference from the bare host with its 95 % t interval, as a PNG."""
    arms = [arm for arm in study.arms if arm != BARE]
    figure = Figure(figsize=(4 * len(study.hosts), 0.6 * len(arms) + 1.4), layout="constrained")
    for axis, host in zip(figure.subplots(1, len(study.hosts), squeeze=False)[0], study.hosts, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for height, arm in enumerate(reversed(arms)):
            found = difference(study, host, arm, lines)
            if found is None:
                continue
            if found.count > 1:
                axis.plot([found.low, found.high], [height, height], color="C0", linewidth=2)
            axis.plot(found.mean, height, "o", color="C0")
            axis.annotate(f"{found.count} seeds", (found.mean, height + 0.18), ha="center", fontsize=8)
        axis.set(title=host, yticks=range(len(arms)), yticklabels=arms[::-1], ylim=(-0.5, len(arms) - 0.3))
        axis.set_xlabel("test accuracy − bare host, points (95 % t interval)")
    figure.savefig(path, dpi=150)
