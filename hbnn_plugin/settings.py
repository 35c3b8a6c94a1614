"""What a user can choose about the exponential parametrization cluster, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from . import ball, sphere
from .scalars import Space

__all__ = ["DEFAULT_RADIUS", "Settings"]

_SPACES: dict[str, Space] = {"ball": ball, "sphere": sphere}
DEFAULT_RADIUS = {"ball": 0.05, "sphere": 1.0}
"""[HBNN] Table I: HBNN (ball) is best at 0.05, SBNN (sphere) at 1.0."""

_CHOICES = {
    "space": ("ball", "sphere"),
    "per": ("layer", "filter"),
    "rule": ("mobius", "riemannian", "riemannian-adam", "fixed"),
    "order": ("simultaneous", "alternating"),
}


@dataclass(frozen=True)
class Settings:
    """One layer's choices; :func:`hbnn_plugin.apply` says what each means. Raises ValueError or TypeError."""

    space: Literal["ball", "sphere"] = "ball"
    radius: float = DEFAULT_RADIUS["ball"]
    per: Literal["layer", "filter"] = "filter"
    rule: Literal["mobius", "riemannian", "riemannian-adam", "fixed"] = "mobius"
    order: Literal["simultaneous", "alternating"] = "simultaneous"
    relative: bool = False
    start: float = 0.0
    point_lr: float = 1.0
    point_momentum: float = 0.0
    point_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {expected}, not {getattr(self, name)!r}")
        for name, low, high in (
            ("radius", 0.0, math.inf),
            ("start", 0.0, 1.0),
            ("point_lr", 0.0, math.inf),
            ("point_momentum", 0.0, 1.0),
            ("point_decay", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not (low <= value <= high) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, not {value!r}")
        if self.radius == 0:
            raise ValueError("radius must be positive, not 0; a radius of 1e-12 is Euclidean for every purpose")
        if self.point_momentum == 1:
            raise ValueError("point_momentum must be below 1")
        if self.space == "sphere" and self.start != 1:
            raise ValueError(
                f"the sphere has no origin to start from: start must be 1 (the weight), not {self.start!r}"
            )
        if self.space == "sphere" and self.point_decay:
            raise ValueError("point_decay shrinks a point towards the origin, which the sphere does not have")
        if self.space == "ball" and self.relative and self.radius >= 1:
            raise ValueError(
                f"relative=True puts each weight at √radius of the edge: radius must be below 1, not {self.radius!r}"
            )

    @property
    def geometry(self) -> Space:
        """The module of formulas of this space."""
        return _SPACES[self.space]

    def __str__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name in ("space", "radius", "per", "rule")
        ]
        shown += [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name not in ("space", "radius", "per", "rule") and getattr(self, f.name) != self._default(f.name)
        ]
        return ", ".join(shown)

    def _default(self, name: str) -> Any:
        if name == "start":
            return 1.0 if self.space == "sphere" else 0.0
        return next(f.default for f in fields(self) if f.name == name)
