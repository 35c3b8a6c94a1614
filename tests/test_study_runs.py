"""A run of the study trains what its line says: the arm's options, the seed's weights, the split's images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import hbnn_plugin
from hosts import binary_layers
from muon import Muon
from reproduction import runs
from reproduction.arms import ARMS, BARE
from reproduction.presets import PRESETS
from reproduction.protocol import Case, Study
from reproduction.runs import Run, Split, execute, load_images
from tiny_hosts import clusters

if TYPE_CHECKING:
    from pathlib import Path

    from images import Images

CASE = Case(PRESETS["smoke"].tasks[0], "irnet")


class Started(NamedTuple):
    """What training is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Images
    held_out: Images


class Begun(Exception):
    """Training is about to begin."""


@pytest.fixture
def started(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def begin(arm: str, seed: int = 0, split: Split = "test", lr: float = 0.1) -> Started:
        found: list[Started] = []

        def fit(model: Any, optimizer: Any, host: Any, train: Any, held_out: Any, *_: Any, **__: Any) -> None:
            found.append(Started(model, optimizer, train, held_out))
            raise Begun

        monkeypatch.setattr(runs, "fit", fit)
        with pytest.raises(Begun):
            execute(run_of(arm, seed, split, lr), data, tmp_path)
        return found[0]

    return begin


def run_of(arm: str, seed: int = 0, split: Split = "test", lr: float = 0.1) -> Run:
    return Study([CASE], {arm: ARMS[arm]}, 1, compiled=False).run(CASE, arm, lr, 1e-4, 1, seed, split)


@pytest.mark.parametrize("arm", ["HBNN", "SBNN", "per layer", "fixed point", "HBNN, r = 5", "Euclidean, spectral"])
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_the_network_has_the_options_of_its_arm(arm: str, started: Any) -> None:
    options = ARMS[arm].options
    assert options
    found = clusters(started(arm).model)
    assert len(found) == 6
    for epc in found.values():
        assert {name: getattr(epc.settings, name) for name in options} == options


def test_the_optimizer_is_that_of_the_arm(started: Any) -> None:
    bare, muon = started(BARE, lr=0.3), started("bare, Muon")
    assert not clusters(bare.model)
    assert type(bare.optimizer) is torch.optim.SGD
    assert [group["lr"] for group in bare.optimizer.param_groups] == [0.3]
    assert [group["weight_decay"] for group in bare.optimizer.param_groups] == [1e-4]
    assert type(muon.optimizer) is Muon
    assert muon.optimizer.param_groups[1]["muon"] == (0.15, 0.75)


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """What has to be the same in paired runs: binary values, and all else that is trained."""
    layers = dict(binary_layers(model))
    binary = {name: layer.binary_weight().detach() > 0 for name, layer in layers.items()}
    rest = {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[0] not in layers}
    return binary | {name: p for name, p in rest.items() if "parametrizations" not in name}


def test_paired_runs_start_from_the_same_weights_and_other_seeds_from_others(started: Any) -> None:
    bare, others = start_of(started(BARE).model), ("HBNN", "SBNN", "HBNN, spectral", "bare, Muon")
    assert len(bare) > 20
    for arm in others:
        mine = start_of(started(arm).model)
        assert mine.keys() == bare.keys()
        assert all(torch.equal(mine[name], bare[name]) for name in bare), arm
    other_seed = start_of(started(BARE, seed=1).model)
    assert all(not torch.equal(other_seed[name], bare[name]) for name, _ in binary_layers(started(BARE).model))


def test_tuning_trains_on_images_that_it_is_not_read_on(data: Path, started: Any) -> None:
    train, test = load_images("cifar10", data, CASE.task.size, CASE.task.limit, "test")
    tuning, fresh = started(BARE, split="validation"), started(BARE, split="test")
    assert torch.equal(torch.cat([tuning.train.pixels, tuning.held_out.pixels]), train.pixels)
    assert (len(tuning.held_out), tuning.held_out.flip, tuning.held_out.shift) == (len(train) // 10, False, 0)
    assert torch.equal(fresh.train.pixels, train.pixels)
    assert torch.equal(fresh.held_out.pixels, test.pixels)
    assert not torch.equal(test.pixels[: len(train)], train.pixels[: len(test)])


def test_the_line_tells_where_the_points_are(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[Any] = []
    fuse = hbnn_plugin.fuse

    def look_and_fuse(model: nn.Module) -> nn.Module:
        reports.extend(hbnn_plugin.cluster_report(model).values())
        return fuse(model)

    monkeypatch.setattr(hbnn_plugin, "fuse", look_and_fuse)
    line = execute(run_of("HBNN"), data, tmp_path)
    assert line["reach"] == pytest.approx(max(layer.reach for layer in reports), abs=1e-4)
    assert line["mean_reach"] == pytest.approx(sum(layer.mean_reach for layer in reports) / 6, abs=1e-4)
    assert line["disagreement"] == pytest.approx(sum(layer.disagreement for layer in reports) / 6, abs=1e-4)
    assert 0 < line["mean_reach"] < line["reach"]


def test_a_run_that_is_continued_names_both_commits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    def at(commit: str) -> None:
        monkeypatch.setattr(runs, "circumstances", lambda *_: {"commit": commit})

    run = Study([CASE], {BARE: ARMS[BARE]}, 1, compiled=False).run(CASE, BARE, 0.1, 1e-4, 2, 0, "test")
    at("one")
    with pytest.raises(KeyboardInterrupt):
        execute(run, data, tmp_path, stop)
    at("two")
    assert execute(run, data, tmp_path)["commit"] == "one, two"
