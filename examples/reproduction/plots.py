"""Pictures from the lines alone, as PNGs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from reproduction.arms import BARE
from reproduction.tables import accuracies, difference, finished

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from matplotlib.axes import Axes

    from reproduction.protocol import Case, Lines, Study

__all__ = ["draw_curves", "draw_differences", "draw_flips", "draw_radii", "draw_surfaces"]


def _panels(count: int, width: float, height: float, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharex=sharex)[0])


def _std(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Over seeds, as in the tables; 0 for one seed."""
    found = np.asarray(values, dtype=float)
    return np.asarray(found.std(0, ddof=min(1, len(found) - 1)))


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:  # an empty one is a warning
        axis.legend()


def draw_differences(study: Study, lines: Lines, path: Path) -> None:
    """Each arm's paired difference from the reference with its 95 % t interval (Tables II and V, ablation).

    A case without any is left out; if all are, the picture has empty panels.
    """
    arms = [arm for arm in study.arms if arm != study.reference]
    known = [case for case in study.cases if any(difference(study, case, arm, lines) for arm in arms)]
    cases = known or study.cases
    figure, axes = _panels(len(cases), 5, 0.6 * len(arms) + 1.4, sharex=True)
    for axis, case in zip(axes, cases, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for height, arm in enumerate(reversed(arms)):
            found = difference(study, case, arm, lines)
            if found is None:
                continue
            if found.count > 1:
                axis.plot([found.low, found.high], [height, height], color="C0", linewidth=2)
            axis.plot(found.mean, height, "o", color="C0")
            axis.annotate(
                f"{found.count} seed{'s' * (found.count > 1)}", (found.mean, height + 0.18), ha="center", fontsize=8
            )
        axis.set(title=str(case), yticks=range(len(arms)), yticklabels=arms[::-1], ylim=(-0.5, len(arms) - 0.3))
        axis.set_xlabel(f"test accuracy − {study.reference}, points\n95 % t interval")
    figure.savefig(path, dpi=150)


def draw_radii(study: Study, lines: Lines, path: Path) -> None:
    """Test accuracy against the radius, ball and sphere, mean ± standard deviation over seeds (Table I)."""
    figure, axes = _panels(len(study.cases), 5, 3.5)
    for axis, case in zip(axes, study.cases, strict=True):
        bare = list(accuracies(study, case, BARE, lines).values()) if BARE in study.arms else []
        if bare:
            axis.axhline(float(np.mean(bare)), color="0.5", linestyle="--", label="bare host")
        for space, label in (("ball", "HBNN (ball)"), ("sphere", "SBNN (sphere)")):
            points = []
            for name, arm in study.arms.items():
                found, options = list(accuracies(study, case, name, lines).values()), arm.options
                if options and options["space"] == space and found:
                    points.append((options["radius"], float(np.mean(found)), float(_std(found))))
            if points:
                radius, mean, std = zip(*sorted(points), strict=True)
                axis.errorbar(radius, mean, std, marker="o", capsize=3, label=label)
        axis.set(title=str(case), xscale="log", xlabel="radius r", ylabel="test accuracy, % (mean ± std)")
        _legend(axis)
    figure.savefig(path, dpi=150)


def _over_epochs(axis: Axes, curves: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Mean and standard deviation over seeds."""
    values = 100 * np.asarray(curves, dtype=float)
    epochs = np.arange(1, values.shape[1] + 1)
    mean, std = values.mean(0), _std(values)
    axis.plot(epochs, mean, color=color, linewidth=1.5, label=f"{label} ({len(values)})")
    axis.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.2, lw=0)


def _colors(study: Study) -> list[tuple[str, str]]:
    """An arm's colour is the same in every panel."""
    return [(f"C{place}", arm) for place, arm in enumerate(study.arms)]


def draw_curves(study: Study, lines: Lines, path: Path) -> None:
    """Test accuracy over the epochs, mean ± standard deviation over the seeds in brackets (Fig. 4)."""
    figure, axes = _panels(len(study.cases), 5, 3.5)
    for axis, case in zip(axes, study.cases, strict=True):
        for color, arm in _colors(study):
            if found := finished(study, case, arm, lines):
                _over_epochs(axis, [line["accuracy"] for line in found], arm, color)
        axis.set(title=str(case), xlabel="epoch", ylabel="test accuracy, % (mean ± std)")
        _legend(axis)
    figure.savefig(path, dpi=150)


def draw_flips(study: Study, lines: Lines, path: Path) -> None:
    """Share of flipped weights, by layer after the last epoch and of all layers over the epochs (Fig. 3)."""
    count = len(study.cases)
    figure = Figure(figsize=(5 * count, 6.5), layout="constrained")
    rows = figure.subplots(2, count, squeeze=False)
    for case, by_layer, by_epoch in zip(study.cases, *rows, strict=True):
        layers: list[str] = []
        for color, arm in _colors(study):
            found = finished(study, case, arm, lines)
            if not found:
                continue
            layers = list(found[0]["flip_ratios"])
            last = 100 * np.array([[line["flip_ratios"][layer][-1] for layer in layers] for line in found])
            by_layer.errorbar(
                range(len(layers)), last.mean(0), _std(last), marker="o", capsize=3, color=color, label=arm
            )
            _over_epochs(by_epoch, [line["flip_ratio"] for line in found], arm, color)
        by_layer.axhline(50, color="0.8", linewidth=1)
        by_layer.set(title=str(case), ylabel="flipped since the start, % (mean ± std)")
        by_layer.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        by_epoch.set(xlabel="epoch", ylabel="the same, all layers, %")
        _legend(by_layer)
    figure.savefig(path, dpi=150)


def draw_surfaces(cases: Sequence[Case], surfaces: Mapping[tuple[str, str], Mapping[str, Any]], path: Path) -> None:
    """Contours of the training loss around each (case, arm) network, the rows of a case in one scale (Fig. 5)."""
    arms = list(dict.fromkeys(arm for _, arm in surfaces))
    figure = Figure(figsize=(4.2 * len(arms), 3.8 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(arms), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        found = [surfaces.get((str(case), arm)) for arm in arms]
        losses = [np.asarray(s["surface"]) for s in found if s]
        if not losses:
            continue
        low, high = min(map(np.min, losses)), max(map(np.max, losses))
        for axis, arm, surface in zip(row, arms, found, strict=True):
            axis.set(title=f"{case}\n{arm}", xlabel="first direction, filter norms", ylabel="second direction")
            if surface:
                ticks = surface["axis"]
                drawn = axis.contourf(ticks, ticks, np.asarray(surface["surface"]).T, np.linspace(low, high, 25))
        figure.colorbar(drawn, ax=list(row), label="training loss, nats")
    figure.savefig(path, dpi=150)
