"""Loss surfaces of an experiment's networks after training, one JSON line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import tqdm  # type: ignore[import-untyped]

from reproduction import ledger
from reproduction.loss_surface import axis, loss_surface
from reproduction.runs import final_network, key_of, load_images

if TYPE_CHECKING:
    from pathlib import Path

    from reproduction.protocol import Case, Lines, Study

__all__ = ["missing_surfaces", "read_surfaces", "run_surfaces"]

POINTS = 21
REACH = 1.0
IMAGES = 1000
"""Training images, as they are."""


def read_surfaces(study: Study, lines: Lines, path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines by (case, arm); without those of networks that were tuned differently by now."""
    surfaces = {key_of(line["config"]): line for line in ledger.read(path)}
    known = {}
    for case, arm in study.pairs:
        for run in study.fresh(case, arm, lines)[:1]:
            if run.key in surfaces:
                known[str(case), arm] = surfaces[run.key]
    return known


def missing_surfaces(study: Study, lines: Lines, path: Path) -> list[tuple[Case, str]]:
    """Networks whose surface has no line."""
    known = read_surfaces(study, lines, path)
    return [(case, arm) for case, arm in study.pairs if (str(case), arm) not in known]


def run_surfaces(study: Study, lines: Lines, data: Path, path: Path, folder: Path) -> None:
    """The surfaces that are missing, of the first fresh seed's network; trained again if its weights are not there."""
    missing = missing_surfaces(study, lines, path)
    with tqdm(total=len(missing) * POINTS, unit="row", desc="surfaces", dynamic_ncols=True) as bar:
        for case, arm in missing:
            run = study.fresh(case, arm, lines)[0]
            _, images = load_images(run.dataset, data, run.size, IMAGES * 10, "validation")
            surface = loss_surface(final_network(run, data, folder), images, POINTS, REACH, row_done=bar.update)
            rounded = [[round(loss, 4) for loss in row] for row in surface]
            line = {"config": run.config, "axis": axis(POINTS, REACH)}
            ledger.append(path, {**line, "images": len(images), "surface": rounded})
