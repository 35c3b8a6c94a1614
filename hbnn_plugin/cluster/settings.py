"""What a user can choose about the exponential parametrization cluster, checked once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Literal, get_args

from ..geometry import ball, sphere
from ..geometry.scalars import Space

__all__ = ["SPACES", "Mode", "Order", "Per", "Rule", "Settings", "SpaceName", "make_settings"]

SPACES: dict[str, Space] = {"ball": ball, "sphere": sphere}
_RADIUS = {"ball": 0.05, "sphere": 1.0}
"""[HBNN] Table I: HBNN (ball) is best at 0.05, SBNN (sphere) at 1.0."""

SpaceName = Literal["ball", "sphere"]
Per = Literal["layer", "filter"]
Rule = Literal["mobius", "riemannian", "riemannian-adam", "spectral", "fixed"]
Order = Literal["simultaneous", "alternating"]
Mode = Literal["parametrize", "inplace"]
_CHOICES = {"space": get_args(SpaceName), "per": get_args(Per), "rule": get_args(Rule), "order": get_args(Order)}


@dataclass(frozen=True)
class Settings:
    """One layer's choices; :func:`hbnn_plugin.apply` says what each means. Raises ValueError or TypeError."""

    space: SpaceName
    radius: float
    per: Per
    rule: Rule
    order: Order
    relative: bool
    start: float
    point_lr: float
    point_lr_power: float
    point_momentum: float
    point_decay: float

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {expected}, not {getattr(self, name)!r}")
        for name, low, high in (
            ("radius", 0.0, math.inf),
            ("start", 0.0, 1.0),
            ("point_lr", 0.0, math.inf),
            ("point_lr_power", 0.0, math.inf),
            ("point_momentum", 0.0, 1.0),
            ("point_decay", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, not {value!r}")
            value = float(value)  # NumPy's numbers too
            object.__setattr__(self, name, value)
            if not (low <= value <= high) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, not {value!r}")
        if not isinstance(self.relative, bool):
            raise TypeError(f"relative must be True or False, not {self.relative!r}")
        if self.rule == "riemannian-adam" and self.point_momentum:
            raise ValueError("rule='riemannian-adam' has a momentum of its own: leave point_momentum at 0")
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

    def point_dims(self, shape: tuple[int, ...], unit_dims: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions of a weight that one point covers; ``unit_dims`` count output units."""
        every = range(len(shape))
        return tuple(d for d in every if self.per == "layer" or d not in unit_dims)

    @property
    def geometry(self) -> Space:
        """The module of formulas of this space."""
        return SPACES[self.space]

    def __str__(self) -> str:
        default = make_settings(self.space, self.rule)
        always = ("space", "radius", "per", "rule")
        changed = (name for name, value in asdict(self).items() if value != getattr(default, name))
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in dict.fromkeys((*always, *changed)))


_SPECTRAL = {"point_lr": 0.15, "point_lr_power": 0.75, "point_momentum": 0.95, "point_decay": 0.02}
"""Of a tuned IR-Net and ReCU, see the README."""
_OTHERS = {"point_lr": 1.0, "point_lr_power": 1.0, "point_momentum": 0.0, "point_decay": 0.0}


def make_settings(
    space: SpaceName = "ball",
    rule: Rule | None = None,
    per: Per = "filter",
    order: Order = "simultaneous",
    relative: bool = False,
    **numbers: float | None,
) -> Settings:
    """The options of :func:`hbnn_plugin.apply`, with the defaults that depend on space and rule in place of None."""
    if rule is None:
        rule = "spectral" if space == "ball" else "mobius"
    defaults = {"radius": _RADIUS.get(space, 1.0), "start": 1.0 if space == "sphere" else 0.0}
    defaults |= _SPECTRAL if rule == "spectral" else _OTHERS
    if space == "sphere":
        defaults["point_decay"] = 0.0
    given = {name: value for name, value in numbers.items() if value is not None}
    return Settings(space=space, rule=rule, per=per, order=order, relative=relative, **(defaults | given))
