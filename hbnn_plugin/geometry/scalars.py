"""What is one number a point: the types that the spaces' formulas share, and several layers' points side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["PointGradient", "Radius", "Slopes", "Space", "scalar", "side_by_side"]

Radius = float | Tensor
"""The radius r: one for the layer, or one a point, broadcastable against the inner products."""


def side_by_side(values: Sequence[float | Tensor], shapes: Sequence[Sequence[int]], like: Tensor) -> float | Tensor:
    """What several layers have one of, or one a point: one number where they share it, else (points,), as ``like``.

    ``shapes``: in which each layer's points are counted.
    """
    if all(not isinstance(value, Tensor) and value == values[0] for value in values):
        return values[0]
    each = (scalar(value, like).expand(*shape).flatten() for value, shape in zip(values, shapes))
    return torch.cat([*each])


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor on ``like``'s device and of its dtype, made there: copying it there would wait on a GPU."""
    return value.to(like) if isinstance(value, Tensor) else torch.full((), value, dtype=like.dtype, device=like.device)


class Slopes(NamedTuple):
    """x = α p + β v, and the partial derivatives of α and β by P = ⟨p,p⟩, V = ⟨v,v⟩ and Q = ⟨p,v⟩."""

    alpha: Tensor
    beta: Tensor
    alpha_p: Tensor
    alpha_v: Tensor
    alpha_q: Tensor
    beta_p: Tensor
    beta_v: Tensor
    beta_q: Tensor


class PointGradient(NamedTuple):
    """What h = ∂L/∂v reveals, each as coefficients in the basis (p, v, h), shape (3, points)."""

    gradient: Tensor
    """∂L/∂p."""
    upstream: Tensor
    """G = ∂L/∂x."""
    relative_slope: Tensor
    """(points,) how much the map squeezes h: its slope in the worst direction, in the ball by that across v."""


class Space(Protocol):
    """What ``geometry/ball.py`` and ``geometry/sphere.py`` provide, as modules of formulas."""

    def exp_slopes(self, pp: Tensor, vv: Tensor, pv: Tensor, r: Radius) -> Slopes: ...
    def needs_exact_products(self, pp: Tensor, r: Radius) -> Tensor: ...
    def log(
        self, pp: Tensor, xx: Tensor, px: Tensor, dd: Tensor, ss: Tensor, r: Radius
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def point_gradient(self, gram: Tensor, r: Radius) -> PointGradient: ...
    def point_step(self, pp: Tensor, pg: Tensor, gg: Tensor, step: Tensor, r: Radius) -> tuple[Tensor, Tensor]: ...
