"""Writes an experiment's tables and pictures, from the lines alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import checkpoints
from reproduction import plots
from reproduction.experiments import EXPERIMENTS
from reproduction.search import Search
from reproduction.surfaces import read_surfaces
from reproduction.tables import comparison_table, search_table, tuning_table

if TYPE_CHECKING:
    from pathlib import Path

    from reproduction.protocol import Lines, Study

__all__ = ["write_report"]

_PICTURES = {
    "ablation": plots.draw_differences,
    "table1": plots.draw_radii,
    "table2": plots.draw_differences,
    "table5": plots.draw_differences,
    "fig3": plots.draw_flips,
    "fig4": plots.draw_curves,
}


def write_report(
    experiment: str, comparison: Study | Search, lines: Lines, path: Path, surfaces: Path | None = None
) -> None:
    """``path`` followed by .png, and for what is no figure by .md, which is printed too.

    Raises ValueError where no surface is there to draw.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_name(f"{path.name}.png")  # the name may have a decimal point
    if isinstance(comparison, Search):
        text = search_table(comparison, lines) + "\n\nBare host:\n\n" + tuning_table(comparison.bare, lines) + "\n"
    else:
        if surfaces:
            found = read_surfaces(comparison, lines, surfaces)
            if not found:
                raise ValueError(f"{surfaces} has no surface of these networks; without --report it is worked out")
            plots.draw_surfaces(comparison.cases, found, picture)
        else:
            _PICTURES[experiment](comparison, lines, picture)
        if experiment.startswith("fig"):  # its networks are those of the tables
            print(f"wrote {picture}")
            return
        text = comparison_table(comparison, lines) + "\n"
        if tuning := tuning_table(comparison, lines):
            text += (
                "\nTuning: accuracy on held-out training images in %, one reading a tuning seed.\n\n" + tuning + "\n"
            )
    text = f"{EXPERIMENTS[experiment].title}\n\n{text}"
    checkpoints.write_text(path.with_name(f"{path.name}.md"), text)
    print(text)
