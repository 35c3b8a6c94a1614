"""One training of a study, and the JSON line that it leaves."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

import checkpoints
import cifar
import hbnn_plugin
import image_folder
from distributed import World
from flips import FlipMeter, OscillationMeter
from hosts import get_host
from hosts.networks import NETWORKS
from provenance import circumstances
from training import Diverged, Progress, Recipe, fit, make_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts import Host
    from images import ImageSet

__all__ = ["Run", "Split", "checkpoint_path", "checksum", "execute", "final_network", "key_of", "load_images"]

Split = Literal["validation", "test"]

VALIDATION = 0.1
"""Share of the training images that tuning is read on; the others train meanwhile."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers, and the name of its arm."""

    host: str
    arm: str
    options: dict[str, Any] | None
    """Of ``hbnn_plugin.apply``; None is the host alone."""
    recipe: Recipe
    dataset: str
    arch: str
    size: int
    split: Split
    """What accuracy is read on."""
    limit: int | None = None
    """Use only so many training images, and as many test images."""
    compiled: bool = True
    """Whether the network trains under ``torch.compile``."""

    @property
    def config(self) -> dict[str, Any]:
        """As it stands in the line."""
        return asdict(self)

    @property
    def key(self) -> str:
        """A name for the configuration, whatever its arm is called."""
        return key_of(self.config)

    def __str__(self) -> str:
        r = self.recipe
        return (
            f"{self.dataset} {self.arch} {self.host}, {self.arm}, lr {r.lr:g}, decay {r.weight_decay:g}, "
            f"{r.epochs} epochs, seed {r.seed}, {self.split}"
        )


def key_of(config: dict[str, Any]) -> str:
    """The key of a line's configuration; what the recipe of an older line does not mention has its default."""
    named = {name: value for name, value in config.items() if name != "arm"}
    named["recipe"] = asdict(Recipe()) | config["recipe"]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


@cache
def load_images(dataset: str, data: Path, size: int, limit: int | None, split: Split) -> tuple[ImageSet, ImageSet]:
    """What trains, augmented, and what accuracy is read on."""
    train: ImageSet
    test: ImageSet
    if dataset == "imagenet":
        train, test = image_folder.load(data, size, limit)
    else:
        train, test = cifar.load(data, size, limit, classes=100 if dataset == "cifar100" else 10)
    return train.split(VALIDATION) if split == "validation" else (train, test)


@cache
def checksum(dataset: str, data: Path) -> str:
    """CRC-32 that tells one copy of a dataset from another."""
    if dataset == "imagenet":
        return image_folder.checksum(data)
    return cifar.checksum(data, classes=100 if dataset == "cifar100" else 10)


def _network(run: Run) -> tuple[Host, nn.Module]:
    """The bare host at its start; drawn from the seed, the same for every arm."""
    torch.manual_seed(run.recipe.seed)
    host = get_host(run.host, run.arch)
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[run.dataset]
    return host, NETWORKS[run.arch](host.conv, num_classes=classes)


def execute(
    run: Run,
    data: Path,
    folder: Path,
    epoch_done: Callable[[], None] = lambda: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train, or continue from the checkpoint in ``folder``; returns the line and leaves the plain network's weights.

    ``epoch_done`` is called each time. The line names every commit that the run has trained under. That of one whose
    loss does not stay finite says ``diverged`` and has no figures. In a ``world`` of several ranks all of them call
    this, and rank 0 writes; by default this process is alone.
    """
    world = world or World.from_environment()
    provenance = _provenance(run, data, world)  # of the code as it was loaded, not as it is when the run ends
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    train, held_out = (
        images.to(world.device) for images in load_images(run.dataset, data, run.size, run.limit, run.split)
    )
    host, model = _network(run)
    model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.options is not None:
        hbnn_plugin.apply(model, **run.options)
    optimizer = make_optimizer(model, host, run.recipe)
    meter = FlipMeter(model)
    path = checkpoint_path(run, data, folder)
    progress, commits = Progress(), [provenance["commit"]]
    if path.exists():
        saved = checkpoints.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
        commits = list(dict.fromkeys([*saved["commits"], *commits]))
        provenance["commit"] = ", ".join(commits)
        for _ in range(progress.epoch):
            epoch_done()

    def checkpoint(progress: Progress) -> None:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save(path, {**content, "progress": progress.state_dict(), "commits": commits})
        epoch_done()

    folder.mkdir(parents=True, exist_ok=True)
    torch.compiler.reset()  # what earlier runs of this process compiled counts against a limit
    network = world.parallel(torch.compile(model) if run.compiled else model)  # type: ignore[arg-type]
    with tqdm(disable=True) as bar:
        try:
            progress = fit(
                model,
                optimizer,
                host,
                train,
                held_out,
                run.recipe,
                meter,
                bar,
                progress,
                checkpoint,
                network=network,
                oscillation=OscillationMeter(model),
                world=world,
            )
        except Diverged as error:
            return {"config": run.config, "diverged": str(error), **provenance}
    line = _line(run, model, progress) | provenance
    if world.rank == 0:
        if run.options is not None:
            hbnn_plugin.fuse(model)
        checkpoints.save(_final_path(run, data, folder), model.state_dict())
    return line


def final_network(run: Run, data: Path, folder: Path) -> nn.Module:
    """The plain network after training, in evaluation mode; trained again if its weights are not in ``folder``."""
    path = _final_path(run, data, folder)
    if not path.exists():
        line = execute(run, data, folder)
        if "diverged" in line:
            raise ValueError(f"{run} has no network: {line['diverged']}")
    _, model = _network(run)
    model.load_state_dict(checkpoints.load(path))
    return model.eval()


def checkpoint_path(run: Run, data: Path, folder: Path) -> Path:
    """Where an unfinished run on these images waits."""
    return folder / f"{run.key}-{checksum(run.dataset, data)}.pt"


def _final_path(run: Run, data: Path, folder: Path) -> Path:
    return folder / f"{run.key}-{checksum(run.dataset, data)}-final.pt"


def _line(run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
    def column(name: str) -> list[float]:
        return [round(record[name], 4) for record in progress.history]

    line: dict[str, Any] = {
        "config": run.config,
        "accuracy": column("test_accuracy"),
        "train_loss": column("train_loss"),
        "flip_ratio": column("flip_ratio"),
        "flip_ratios": {
            name: [round(record["flip_ratios"][name], 3) for record in progress.history]
            for name in progress.history[-1]["flip_ratios"]
        },
        "oscillation": column("oscillation"),
        "seconds": round(sum(column("seconds")), 1),
    }
    if run.options is not None:
        report = hbnn_plugin.cluster_report(model).values()
        line["reach"] = round(max(layer.reach for layer in report), 4)
        line["mean_reach"] = round(statistics.mean(layer.mean_reach for layer in report), 4)
        line["disagreement"] = round(statistics.mean(layer.disagreement for layer in report), 4)
    return line


def _provenance(run: Run, data: Path, world: World) -> dict[str, str]:
    unit = "GPU" if world.device.type == "cuda" else "CPU thread"
    return {"dataset_crc32": checksum(run.dataset, data), **circumstances(world.size, unit)}
