"""The packages of the library build on each other in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hbnn_plugin

ROOT = Path(hbnn_plugin.__file__).parent
ORDER = ("version", "geometry", "host", "cluster", "optimizer", "diagnostics", "retrofit", "export", "launcher")
"""Each imports only from those before it, and from itself."""


def imported(path: Path) -> Iterator[str]:
    """The parts of the library that a file imports from, wherever in the file."""
    package = path.relative_to(ROOT.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (*package[: len(package) + 1 - node.level], *(node.module or "").split("."))
            yield next(part for part in (*parts[1:], *(name.name for name in node.names)) if part)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not any(name.split(".")[0] == "hbnn_plugin" for name in names), "imports here are relative"


def test_every_part_of_the_library_has_its_place_in_the_order() -> None:
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER[1:])
def test_imports_point_one_way(part: str) -> None:
    allowed = ORDER[: ORDER.index(part) + 1]
    for path in (ROOT / part).glob("*.py"):
        assert set(imported(path)) <= set(allowed), path
