"""What is compared: the options of ``hbnn_plugin.apply`` behind each name."""

from __future__ import annotations

from typing import Any

__all__ = ["ARMS", "BARE", "TABLE5", "VARIANTS"]

BARE = "bare"

_LITERAL: dict[str, Any] = {"space": "ball", "radius": 0.05, "per": "filter", "rule": "mobius", "point_lr": 1.0}

ARMS: dict[str, dict[str, Any] | None] = {
    BARE: None,
    "fixed point": {**_LITERAL, "rule": "fixed", "start": 0.5},
    "Euclidean": {**_LITERAL, "radius": 1e-12},
    "SBNN": {"space": "sphere", "radius": 1.0, "per": "filter", "rule": "mobius", "point_lr": 1.0},
    "HBNN": _LITERAL,
}
"""Name → options, spelled out so that a change of the library's defaults changes no arm; None is the host alone."""

TABLE5 = tuple(ARMS)

VARIANTS: dict[str, dict[str, Any]] = {}
"""Readings of what the paper leaves open, and what goes beyond it: the candidates of the search."""
