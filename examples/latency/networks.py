"""The networks that are measured, and how one is trained for a few minutes on real images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoints
import cifar
import hbnn_plugin
from hosts import get_host
from hosts.networks import NETWORKS, WIDE, ResNet
from training import Recipe, make_optimizer, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Network", "trained"]

BATCH = 32

_ARCHS: dict[str, Callable[..., nn.Module]] = {
    **NETWORKS,
    "resnet34": partial(
        ResNet, blocks=(3, 4, 6, 3), widths=WIDE, num_classes=10, in_channels=3, downsample=True, imagenet=False
    ),
}


@dataclass(frozen=True)
class Network:
    """A host's network on images of one size."""

    host: str
    arch: str
    pixels: int = 32

    def __str__(self) -> str:
        return f"{self.host} {self.arch.removesuffix('_imagenet')} {self.pixels}×{self.pixels}"

    def build(self) -> nn.Module:
        """The host alone, in evaluation mode: weights of a fixed seed, BatchNorm statistics of one batch of noise."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _ARCHS[self.arch](get_host(self.host, self.arch).conv)
        with torch.no_grad():
            model.train()(self.noise(8))
        return model.eval()

    def noise(self, batch: int) -> Tensor:
        """Standardized, of shape (batch, 3, pixels, pixels)."""
        return torch.randn(batch, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(batch))


def trained(network: Network, steps: int, data: Path, runs: Path) -> nn.Module:
    """The network after so many steps of 32 CIFAR-10 images with HBNN applied; from ``runs`` if it is there already."""
    model, host = hbnn_plugin.apply(network.build()), get_host(network.host, network.arch)
    path = runs / f"{network.host}-{network.arch}-{steps}.pt"
    if path.exists():
        model.load_state_dict(checkpoints.load(path))
        return model.eval()
    images, _ = cifar.load(data, limit=steps * BATCH)
    recipe = Recipe(epochs=steps, batch_size=BATCH, lr=0.03)  # its schedule moves with every step
    optimizer = make_optimizer(model, host, recipe)
    model.train()
    with progress_bar(f"train {network}", steps) as bar:
        for step, (x, labels) in enumerate(images.epoch(recipe.seed, 0, BATCH)):
            host.set_progress(model, step / steps)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    runs.mkdir(parents=True, exist_ok=True)
    checkpoints.save(path, model.state_dict())
    return model.eval()
