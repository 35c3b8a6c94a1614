"""The loss around a trained network, in two random directions ([HBNN] Fig. 5).

Li et al., *Visualizing the Loss Landscape of Neural Nets* (arXiv:1712.09913): each filter of a direction has the norm
of the network's own filter, so that networks whose filters differ in size can be compared; vectors (biases, BatchNorm)
and scales a channel stay as they are. Of a binary layer it is the real weight that moves, and the forward binarizes it
as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from images import ImageSet

__all__ = ["axis", "loss_surface"]

BATCH = 500


def axis(points: int, reach: float) -> list[float]:
    """Where the surface is sampled along each direction, in norms of the filters."""
    values: list[float] = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    return values


@torch.no_grad()
def loss_surface(
    model: nn.Module,
    images: ImageSet,
    points: int,
    reach: float,
    seed: int = 0,
    row_done: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Mean cross-entropy at ``points`` × ``points`` places; the network itself, plain or fused, is in the middle.

    ``seed`` draws the directions: equal for networks of the same shapes. The weights are put back afterwards.
    """
    weights: list[Tensor] = [p for p in model.parameters() if p.dim() in (2, 4)]  # a channel's scale has three
    centre = [p.clone() for p in weights]
    directions = _directions(weights, seed), _directions(weights, seed + 1)
    surface = []
    try:
        for x in axis(points, reach):
            row = []
            for y in axis(points, reach):
                for p, start, first, second in zip(weights, centre, *directions, strict=True):
                    p.copy_(start + x * first + y * second)
                row.append(_loss(model, images))
            surface.append(row)
            row_done()
    finally:
        for p, start in zip(weights, centre, strict=True):
            p.copy_(start)
    return surface


def _loss(model: nn.Module, images: ImageSet) -> float:
    total = sum(
        F.cross_entropy(model(batch), labels, reduction="sum").item() for batch, labels in images.batches(BATCH)
    )
    return total / len(images)


def _directions(weights: list[Tensor], seed: int) -> list[Tensor]:
    """Normal random numbers, each filter scaled to the norm of the weight's."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for p in weights:
        direction = torch.randn(p.shape, generator=generator).to(p)
        dims = tuple(range(1, p.dim()))
        own, drawn = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (p, direction))
        found.append(direction * (own / drawn))
    return found
