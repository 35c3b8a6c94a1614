"""The loss surfaces of an experiment, from trained networks to their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproduction import ledger, runs, surfaces
from reproduction.experiments import EXPERIMENTS
from reproduction.loss_surface import loss_surface
from reproduction.presets import PRESETS
from reproduction.protocol import Lines
from study_lines import finish

IMAGES = 20


def test_each_network_has_its_surface(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is missing is trained; one whose weights are there is not trained again for its surface."""
    monkeypatch.setattr(surfaces, "POINTS", 3)
    monkeypatch.setattr(surfaces, "IMAGES", IMAGES)
    experiment, preset = EXPERIMENTS["fig5"], PRESETS["smoke"]
    study = experiment.study(preset, experiment.cases(preset, ["irnet"], ["resnet8"]), ["bare", "HBNN"])
    lines = Lines(finish(study, lambda run: run.recipe.lr))
    path, folder = tmp_path / "fig5-smoke.jsonl", tmp_path / "runs"
    surfaces.run_surfaces(study, lines, data, path, folder)
    written = path.read_text().splitlines()
    assert len(written) == len(surfaces.read_surfaces(study, lines, path)) == 2

    monkeypatch.delattr(runs, "execute")  # the weights are there
    for (case, arm), line in zip(study.pairs, ledger.read(path), strict=True):
        run = study.fresh(case, arm, lines)[0]
        assert (runs.key_of(line["config"]), line["axis"], line["images"]) == (run.key, [-1.0, 0.0, 1.0], IMAGES)
        _, images = runs.load_images(run.dataset, data, run.size, 10 * IMAGES, "validation")
        expected = loss_surface(runs.final_network(run, data, folder), images, 3, 1.0)
        assert line["surface"] == [[round(loss, 4) for loss in row] for row in expected]

    path.write_text(written[0] + "\n")
    surfaces.run_surfaces(study, lines, data, path, folder)
    assert path.read_text().splitlines() == written
