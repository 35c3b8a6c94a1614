"""Points on the ball and the sphere that the tests of the map start from."""

from __future__ import annotations

import torch
from torch import Tensor

from hbnn_plugin import ball, sphere

SPACES = {"ball": ball, "sphere": sphere}


def inside(direction: Tensor, share: float, radius: float) -> Tensor:
    """Points at ``share`` of the way to the ball's edge (the origin for a zero direction)."""
    norm = direction.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, direction / norm.clamp(min=1e-30), 0.0) * share / radius**0.5


def on_sphere(direction: Tensor, radius: float) -> Tensor:
    direction = direction + torch.eye(direction.shape[0], direction.shape[1], dtype=direction.dtype) * 1e-3 + 1e-2
    return direction / direction.norm(dim=-1, keepdim=True) / radius**0.5
