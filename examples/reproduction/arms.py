"""What is compared: what each name puts on a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ARMS", "BARE", "RADII", "SEARCHED", "Arm"]

BARE = "bare"

Options = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What is put on a host."""

    options: Options | None = None
    """Of ``hbnn_plugin.apply``; None is the host alone."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """Of the binary layers' weights."""
    tuned_as: str | None = None
    """The arm whose tuned learning rate and weight decay it takes; by default it is tuned itself."""


_LITERAL: Options = {"space": "ball", "radius": 0.05, "per": "filter", "rule": "mobius", "point_lr": 1.0}
_SPHERE: Options = {"space": "sphere", "radius": 1.0, "per": "filter", "rule": "mobius", "point_lr": 1.0}
_SPECTRAL: Options = {**_LITERAL, "rule": "spectral", "point_momentum": 0.95, "point_decay": 0.02}
_ROOT: Options = {**_SPECTRAL, "point_lr": 0.1, "point_lr_power": 0.5}
_DEFAULT: Options = {**_SPECTRAL, "point_lr": 0.15, "point_lr_power": 0.75}
_FLAT = 1e-12

_OPEN: dict[str, Options] = {
    "per layer": {**_LITERAL, "per": "layer"},
    "r = 1": {**_LITERAL, "radius": 1.0},
    "relative": {**_LITERAL, "relative": True},
    "relative, r = 0.5": {**_LITERAL, "relative": True, "radius": 0.5},
    "Riemannian": {**_LITERAL, "rule": "riemannian"},
    "alternating": {**_LITERAL, "order": "alternating"},
    "start 0.5": {**_LITERAL, "start": 0.5},
    "point_lr 0.3": {**_LITERAL, "point_lr": 0.3},
    "point_lr 3": {**_LITERAL, "point_lr": 3.0},
    "point_momentum 0.9, point_lr 0.1": {**_LITERAL, "point_momentum": 0.9, "point_lr": 0.1},
    "point_decay 5e-4": {**_LITERAL, "point_decay": 5e-4},
}
"""One choice at a time away from the literal reading."""

_TABLE1 = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_RADII = {
    f"{name}, r = {r:g}": Arm({**options, "radius": r}, tuned_as=name)
    for name, options in (("HBNN", _LITERAL), ("SBNN", _SPHERE))
    for r in _TABLE1
}
"""The paper trains all of them alike."""

_APPLIED: dict[str, Options] = {
    "fixed point": {**_LITERAL, "rule": "fixed", "start": 0.5},
    "Euclidean": {**_LITERAL, "radius": _FLAT},
    "SBNN": _SPHERE,
    "HBNN": _LITERAL,
    "HBNN, spectral, √lr": _ROOT,
    "HBNN, spectral": _DEFAULT,
    "Euclidean, spectral": {**_DEFAULT, "radius": _FLAT},
    **_OPEN,
}

ARMS: dict[str, Arm] = {
    BARE: Arm(),
    "bare, Muon": Arm(optimizer="muon"),
    **{name: Arm(options) for name, options in _APPLIED.items()},
    **_RADII,
}
"""By name; options are spelled out so that a change of the library's defaults changes no arm.

"Euclidean" is x = v + p, the point as a second copy of the weights without curvature. "spectral" goes beyond the paper
and is the library's default; "√lr" was the default before, with points whose rate goes with the root of the learning
rate; the new one's power was chosen by two more runs a host at the old one's tuned learning rate and decay (arms "p =
1" and "p = 3/4" among the lines). "bare, Muon" is the control of the default: the same directions, momentum, rate and
decay (0.02, whatever the weight decay of all else) on the host's own weights.
"""

SEARCHED = (
    "HBNN",
    "HBNN, spectral, √lr",
    "HBNN, spectral",
    "Euclidean, spectral",
    *_OPEN,
    "fixed point",
    "Euclidean",
    "SBNN",
)
"""The search for a default, and its controls."""

RADII = tuple(_RADII)
"""Of Table I."""
