"""What is compared: the options of ``hbnn_plugin.apply`` behind each name."""

from __future__ import annotations

from typing import Any

__all__ = ["ARMS", "BARE"]

BARE = "bare"

_LITERAL: dict[str, Any] = {"space": "ball", "radius": 0.05, "per": "filter", "rule": "mobius", "point_lr": 1.0}

_SPECTRAL: dict[str, Any] = {**_LITERAL, "rule": "spectral", "point_lr": 0.5, "point_decay": 0.05}

ARMS: dict[str, dict[str, Any] | None] = {
    BARE: None,
    "fixed point": {**_LITERAL, "rule": "fixed", "start": 0.5},
    "Euclidean": {**_LITERAL, "radius": 1e-12},
    "SBNN": {"space": "sphere", "radius": 1.0, "per": "filter", "rule": "mobius", "point_lr": 1.0},
    "HBNN": _LITERAL,
    "Euclidean, spectral": {**_SPECTRAL, "radius": 1e-12},
    "HBNN, spectral": _SPECTRAL,
}
"""Name → options, spelled out so that a change of the library's defaults changes no arm; None is the host alone.

"Euclidean" is x = v + p, the point as a second copy of the weights without curvature. "spectral" goes beyond the paper.
"""
