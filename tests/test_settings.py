"""The defaults of apply's options are those that README's table names."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hbnn_plugin.cluster.settings import make_settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

COMMON = {"per": "filter", "order": "simultaneous", "relative": False}
POINTS = ("point_lr", "point_lr_power", "point_momentum", "point_decay")
BALL = {**COMMON, "space": "ball", "radius": 0.05, "start": 0.0}
SPHERE = {**COMMON, "space": "sphere", "radius": 1.0, "start": 1.0}
SPECTRAL = dict(zip(POINTS, (0.15, 0.75, 0.95, 0.02), strict=True))
OTHERS = dict(zip(POINTS, (1.0, 1.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {**BALL, "rule": "spectral", **SPECTRAL}),
        ({"rule": "mobius"}, {**BALL, "rule": "mobius", **OTHERS}),
        ({"rule": "riemannian-adam"}, {**BALL, "rule": "riemannian-adam", **OTHERS}),
        ({"space": "sphere"}, {**SPHERE, "rule": "mobius", **OTHERS}),
        ({"space": "sphere", "rule": "spectral"}, {**SPHERE, "rule": "spectral", **SPECTRAL, "point_decay": 0.0}),
    ],
)
def test_the_defaults(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert asdict(make_settings(**options)) == expected


def test_the_readme_names_them() -> None:
    assert "| `point_lr`, `point_lr_power` | 0.15, 0.75 (other rules: 1, 1) |" in README
    assert "| `point_momentum`, `point_decay` | 0.95, 0.02 (other rules: 0, 0) |" in README
    for name, value in (("space", "ball"), ("per", "filter"), ("rule", "spectral"), ("order", "simultaneous")):
        assert re.search(rf'\| `{name}` \| `"{value}"` \|', README)
    assert "| `radius` | 0.05 (sphere: 1.0) |" in README
    assert "| `relative` | `False` |" in README
    assert "| `start` | 0 (sphere: 1) |" in README
