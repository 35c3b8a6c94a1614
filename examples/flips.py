"""Weight flip ratios from what the hosts really convolve with, measured alike with and without the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hosts.common import binary_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FlipMeter", "OscillationMeter", "comparison"]

MEAN = "all layers"


class FlipMeter:
    """Remembers the binary values of a model's binary layers, to say later which share of them has flipped."""

    def __init__(self, model: nn.Module) -> None:
        self.start = _binary_values(model)

    def ratios(self, model: nn.Module) -> dict[str, float]:
        """Flip ratio of each layer by name, and of all binary weights together as the last entry."""
        flipped = {name: now != self.start[name] for name, now in _binary_values(model).items()}
        ratios = {name: values.float().mean().item() for name, values in flipped.items()}
        total = sum(int(values.sum()) for values in flipped.values()) / sum(v.numel() for v in flipped.values())
        return {**ratios, MEAN: total}


class OscillationMeter:
    """Which weights flip and flip back: sampled every few steps, the share that changed sign at least twice."""

    def __init__(self, model: nn.Module) -> None:
        self.restart(model)

    def restart(self, model: nn.Module) -> None:
        """Begin anew, such as with an epoch."""
        self.last = _binary_values(model)
        self.changes = {name: torch.zeros_like(values, dtype=torch.int32) for name, values in self.last.items()}

    def sample(self, model: nn.Module) -> None:
        """Take the binary values as they are now."""
        now = _binary_values(model)
        for name, values in now.items():
            self.changes[name] += values != self.last[name]
        self.last = now

    def ratio(self) -> float:
        """Share of all binary weights that changed at least twice between samples."""
        again = sum(int((changes > 1).sum()) for changes in self.changes.values())
        return again / sum(changes.numel() for changes in self.changes.values())


@torch.no_grad()
def _binary_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.binary_weight() > 0 for name, layer in binary_layers(model)}


def comparison(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Flip ratios side by side: one row a layer, one column a run."""
    names = list(next(iter(columns.values())))
    width = max(len(name) for name in names)
    lines = ["flip ratio".ljust(width) + "".join(f"{title:>12}" for title in columns)]
    lines += [name.ljust(width) + "".join(f"{run[name]:12.1%}" for run in columns.values()) for name in names]
    return "\n".join(lines)
