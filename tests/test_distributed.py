"""Two processes train together as torchrun starts them; this file is also the script that they run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoints
import hbnn_plugin
from distributed import ALONE, World
from flips import FlipMeter
from hosts import HOSTS
from images import Images
from training import Progress, Recipe, accuracy, fit, make_optimizer
from two_ranks import torchrun

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(epochs=2, batch_size=8)
CHECKPOINT_EVERY = 2


class Tiny(nn.Module):
    """In float64, where sums in another order flip no sign."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = HOSTS["irnet"].conv(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.linear = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2(F.hardtanh(self.conv1(x.double()))))
        return self.linear(F.hardtanh(x).mean((2, 3)))


def image_sets() -> tuple[Images, Images]:
    """21 images make a last batch of 5, which two ranks cannot halve, nor the 15 for testing."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (36, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (36,), generator=generator)
    mean, std = (0.5,) * 3, (0.25,) * 3
    return Images(pixels[:21], labels[:21], mean, std, shift=1, flip=True), Images(pixels[21:], labels[21:], mean, std)


def train(
    world: World,
    norm: bool,
    path: Path | None = None,
    saved: Callable[[Progress], None] = lambda _: None,
    mode: Any = "parametrize",
) -> dict[str, Any]:
    """From the checkpoint at ``path``, if there is one; ``saved`` is called after each that is written there."""
    torch.manual_seed(0)
    host, model = HOSTS["irnet"], Tiny(norm)
    hbnn_plugin.apply(model, mode=mode)
    optimizer = make_optimizer(model, host, RECIPE)
    meter, progress = FlipMeter(model), Progress()
    if path and path.exists():
        content = checkpoints.load(path)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        progress = Progress(**content["progress"])

    def checkpoint(progress: Progress) -> None:
        if path:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(path, {**content, "progress": progress.state_dict()})
            saved(progress)

    with tqdm(disable=True) as bar:
        progress = fit(
            model,
            optimizer,
            host,
            *image_sets(),
            RECIPE,
            meter,
            bar,
            progress,
            checkpoint,
            CHECKPOINT_EVERY,
            world=world,
        )
    history = [{key: value for key, value in record.items() if key != "seconds"} for record in progress.history]
    return {"model": model.state_dict(), "history": history}


def main(out: Path) -> None:
    """As one of two ranks, of which rank 0 kills itself within the second epoch. Repeated, it continues from there."""
    world = World.from_environment()
    path = out / "checkpoint.pt"
    first = not path.exists()

    def die(progress: Progress) -> None:
        assert world.rank == 0
        if first and (progress.epoch, progress.step) == (1, CHECKPOINT_EVERY):
            os.kill(os.getpid(), signal.SIGKILL)

    if first:
        for norm in (False, True):
            torch.save(train(world, norm), out / f"whole-{norm}-{world.rank}.pt")
        torch.save(train(world, False, mode="inplace"), out / f"inplace-{world.rank}.pt")
    torch.save(train(world, True, path, die), out / f"resumed-{world.rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks have left, killed once."""
    out = tmp_path_factory.mktemp("ranks")
    python_path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "examples"))
    killed, done = (torchrun(__file__, str(out), env={"PYTHONPATH": python_path}) for _ in range(2))
    assert (killed.returncode, done.returncode) == (1, 0), done.stderr
    assert "SIGKILL" in killed.stderr
    return out


def load(ranks: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(ranks / f"{name}.pt", weights_only=True)
    return content


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("mode", "name"), [("parametrize", "whole-False"), ("inplace", "inplace")])
def test_two_ranks_train_as_one_process_does(mode: str, name: str, ranks: Path) -> None:
    alone, together = train(ALONE, False, mode=mode), load(ranks, f"{name}-0")
    assert same(load(ranks, f"{name}-1")["model"], together["model"])
    points = [key for key in alone["model"] if key.startswith("conv2") and key.endswith("point")]
    assert points and all(alone["model"][key].abs().max() > 1e-3 for key in points)  # they move
    assert alone["model"].keys() == together["model"].keys()
    for key, value in alone["model"].items():
        torch.testing.assert_close(together["model"][key], value, rtol=1e-9, atol=1e-12)
    for one, two in zip(alone["history"], together["history"], strict=True):
        assert two.pop("train_loss") == pytest.approx(one.pop("train_loss"), rel=1e-6)  # summed in float32
        assert one == two


def test_ranks_end_with_the_same_network_and_its_accuracy(ranks: Path) -> None:
    first, second = (load(ranks, f"whole-True-{rank}") for rank in range(2))
    assert same(first["model"], second["model"])  # with BatchNorm's statistics
    assert first["history"] == second["history"]
    model = Tiny(True)
    hbnn_plugin.apply(model)
    model.load_state_dict(first["model"])
    assert 0 < accuracy(model, image_sets()[1]) == first["history"][-1]["test_accuracy"]


def test_ranks_killed_within_an_epoch_continue_to_the_same_end(ranks: Path) -> None:
    whole = load(ranks, "whole-True-0")
    for rank in range(2):
        resumed = load(ranks, f"resumed-{rank}")
        assert same(resumed["model"], whole["model"])
        assert resumed["history"] == whole["history"]


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    world = World.from_environment()
    assert (world.rank, world.size) == (0, 1)
    model = Tiny(False)
    assert world.parallel(model) is model
    world.close()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 processes on a machine of 2 GPUs"):
        World.from_environment()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
