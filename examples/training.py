"""One training loop for every example: SGD with momentum, cosine learning rate, cross-entropy."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from distributed import ALONE
from flips import MEAN
from hosts import binary_layers
from muon import Muon

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import World
    from flips import FlipMeter, OscillationMeter
    from hosts import Host
    from images import ImageSet

__all__ = ["Diverged", "Progress", "Recipe", "accuracy", "fit", "make_optimizer", "predict", "progress_bar"]

EVALUATION_BATCH = 500
OSCILLATION_EVERY = 10
"""Steps between two looks at the signs."""


class Diverged(FloatingPointError):
    """The training loss is not finite any more."""


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that changes its numbers, apart from model and data."""

    epochs: int = 120
    batch_size: int = 128
    """Over all processes."""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    optimizer: Literal["sgd", "muon"] = "sgd"
    """Of the binary layers' weights; everything else trains by SGD."""
    muon_rate: float = 0.15
    """With Muon their rate is ``muon_rate * lr**muon_power``, as that of spectral points is by default."""
    muon_power: float = 0.75

    def learning_rate(self, epoch: int) -> float:
        """Cosine from ``lr`` towards zero, constant within an epoch."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


@dataclass
class Progress:
    """How far a run has come: the next batch to train on, the sums of the epoch so far, a record of each epoch done."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_optimizer(model: nn.Module, host: Host, recipe: Recipe) -> torch.optim.SGD:
    """SGD, or Muon; a host that wants no weight decay on its latent weights gets a group of parameters without."""
    latent = {id(p) for _, layer in binary_layers(model) for p in layer.parameters() if p.dim() == layer.weight.dim()}
    muon = recipe.optimizer == "muon"
    apart = latent if muon or not host.decays_latent else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in apart], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if id(p) in apart], "weight_decay": 0.0},
    ]
    if muon:
        groups[1] |= {"momentum": 0.0, "muon": (recipe.muon_rate, recipe.muon_power)}
    make = Muon if muon else torch.optim.SGD
    return make([g for g in groups if g["params"]], lr=recipe.lr, momentum=recipe.momentum)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    host: Host,
    train: ImageSet,
    test: ImageSet,
    recipe: Recipe,
    meter: FlipMeter,
    bar: tqdm,
    progress: Progress | None = None,
    checkpoint: Callable[[Progress], None] | None = None,
    checkpoint_every: int | None = None,
    network: Callable[[Tensor], Tensor] | None = None,
    oscillation: OscillationMeter | None = None,
    world: World = ALONE,
) -> Progress:
    """Train from ``progress`` to the last epoch; test and record after each.

    ``checkpoint`` is called after each epoch, and within one after every ``checkpoint_every`` steps. ``network`` is the
    model as training calls it, such as ``torch.compile(model)``; by default ``world.parallel(model)``. ``oscillation``
    samples the signs; then each epoch's record holds its ratio, and the flips layer by layer.

    In a ``world`` of several ranks, all pass the same arguments and get the same figures, those of all ranks together;
    ``checkpoint`` is called on rank 0 alone.
    """
    progress = progress or Progress()
    network = world.parallel(model) if network is None else network  # a compiled model has no truth value
    checkpoint_here = checkpoint if world.rank == 0 else None
    steps = train.steps(recipe.batch_size, world)
    while progress.epoch < recipe.epochs:
        host.set_progress(model, progress.epoch / recipe.epochs)
        rate = recipe.learning_rate(progress.epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        if oscillation:
            oscillation.restart(model)
        clock = time.perf_counter() - progress.seconds
        # Summed on the device: reading the loss in every step would make a GPU wait. Each rank has its part of the sum.
        loss_sum = torch.tensor(progress.loss_sum / world.size, dtype=torch.float32, device=_device(model))
        for images, labels in train.epoch(recipe.seed, progress.epoch, recipe.batch_size, progress.step, world):
            optimizer.zero_grad()
            # The ranks' mean losses count as their shares of the batch do, which may differ in the last one.
            batch = min(recipe.batch_size, len(train) - progress.step * recipe.batch_size)
            loss = F.cross_entropy(network(images), labels) * (len(labels) * world.size / batch)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() / world.size
            progress.step += 1
            bar.update()
            if oscillation and progress.step % OSCILLATION_EVERY == 0:
                oscillation.sample(model)
            if checkpoint_every and progress.step % checkpoint_every == 0 and progress.step < steps:
                progress.loss_sum, progress.seconds = world.sum(loss_sum).item(), time.perf_counter() - clock
                loss_sum /= world.size
                if checkpoint_here:
                    checkpoint_here(progress)
        flips = meter.ratios(model)
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "lr": rate,
            "train_loss": world.sum(loss_sum).item() / steps,
            "test_accuracy": accuracy(model, test, world),
            "flip_ratio": flips.pop(MEAN),
            "seconds": round(time.perf_counter() - clock, 3),
        }
        if oscillation:
            record |= {"oscillation": oscillation.ratio(), "flip_ratios": flips}
        if not math.isfinite(record["train_loss"]):
            raise Diverged(
                f"The training loss is {record['train_loss']} in epoch {record['epoch']}. Try a smaller learning rate."
            )
        progress = Progress(epoch=progress.epoch + 1, history=[*progress.history, record])
        bar.set_postfix(loss=f"{record['train_loss']:.3f}", test=f"{record['test_accuracy']:.1%}")
        if checkpoint_here:
            checkpoint_here(progress)
    return progress


@torch.no_grad()
def predict(model: nn.Module, images: ImageSet) -> Tensor:
    """Logits of a whole set, in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch, _ in images.batches(EVALUATION_BATCH)])


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, world: World = ALONE) -> float:
    """Share of images classified correctly, each rank classifying its part."""
    world.copy_buffers(model)
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=_device(model))
    for batch, labels in images.batches(EVALUATION_BATCH, world):
        correct += (model(batch).argmax(1) == labels).sum()
    return int(world.sum(correct)) / len(images)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def progress_bar(title: str, total: int, done: int = 0) -> tqdm:
    """A bar that says what is left."""
    return tqdm(total=total, initial=done, desc=title, unit="step", dynamic_ncols=True)
