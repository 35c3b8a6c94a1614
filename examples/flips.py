"""Weight flip ratios from what the hosts really convolve with, measured alike with and without the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hosts.common import binary_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FlipMeter", "comparison"]

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
