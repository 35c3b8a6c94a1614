"""One training of the study, and the JSON line that it leaves."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import checkpoints
import cifar
import hbnn_plugin
from flips import FlipMeter, OscillationMeter
from hosts import get_host
from hosts.networks import NETWORKS
from training import Diverged, Progress, Recipe, fit, make_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from images import Images

__all__ = ["Run", "Split", "execute", "key_of"]

Split = Literal["validation", "test"]

VALIDATION = 0.1
"""Share of the training images, the last ones, that tuning is read on; the others train meanwhile."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers, and the name of its arm."""

    host: str
    arm: str
    options: dict[str, Any] | None
    """Of ``hbnn_plugin.apply``; None is the host alone."""
    recipe: Recipe
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
            f"{self.host} {self.arm}, lr {r.lr:g}, decay {r.weight_decay:g}, {r.epochs} epochs, seed {r.seed}, "
            f"{self.split}"
        )


def key_of(config: dict[str, Any]) -> str:
    """The key of a line's configuration."""
    named = {name: value for name, value in config.items() if name != "arm"}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _images(data: Path, size: int, split: str, limit: int | None) -> tuple[Images, Images]:
    train, test = cifar.load(data, size, limit)
    if split == "test":
        return train, test
    kept = round(len(train) * (1 - VALIDATION))
    held_out = replace(train, pixels=train.pixels[kept:], labels=train.labels[kept:], shift=0, flip=False)
    return replace(train, pixels=train.pixels[:kept], labels=train.labels[:kept]), held_out


def execute(run: Run, data: Path, folder: Path, epoch_done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train, or continue from the checkpoint in ``folder``; returns the line. ``epoch_done`` is called each time.

    The line of a run whose loss does not stay finite says ``diverged`` and has no figures.
    """
    torch.set_num_threads(1)
    train, held_out = _images(data, run.size, run.split, run.limit)
    torch.manual_seed(run.recipe.seed)
    host = get_host(run.host, run.arch)
    model = NETWORKS[run.arch](host.conv).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if run.options is not None:
        hbnn_plugin.apply(model, **run.options)
    optimizer = make_optimizer(model, host, run.recipe)
    meter = FlipMeter(model)
    path = folder / f"{run.key}.pt"
    progress = Progress()
    if path.exists():
        saved = checkpoints.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
        for _ in range(progress.epoch):
            epoch_done()

    def checkpoint(progress: Progress) -> None:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save(path, {**content, "progress": progress.state_dict()})
        epoch_done()

    folder.mkdir(parents=True, exist_ok=True)
    torch.compiler.reset()  # what earlier runs of this process compiled counts against a limit
    network = torch.compile(model) if run.compiled else model
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
            )
        except Diverged as error:
            return {"config": run.config, "diverged": str(error), **_circumstances()}
    return _line(run, model, progress)


def _line(run: Run, model: torch.nn.Module, progress: Progress) -> dict[str, Any]:
    def column(name: str, digits: int = 4) -> list[float]:
        return [round(record[name], digits) for record in progress.history]

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
        **_circumstances(),
    }
    if run.options is not None:
        report = hbnn_plugin.cluster_report(model).values()
        line["reach"] = round(max(layer.reach for layer in report), 4)
        line["mean_reach"] = round(statistics.mean(layer.mean_reach for layer in report), 4)
        line["disagreement"] = round(statistics.mean(layer.disagreement for layer in report), 4)
    return line


@cache
def _circumstances() -> dict[str, str]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "+"  # with uncommitted changes
    return {
        "commit": commit,
        "hardware": f"{platform.machine()} {platform.system()}, one CPU thread",
        "torch": torch.__version__,
        "plugin": hbnn_plugin.__version__,
    }
