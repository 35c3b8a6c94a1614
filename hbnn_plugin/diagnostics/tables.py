"""What reports are made of: something by layer, and plain-text tables for reprs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

__all__ = ["ByLayer", "table"]

T = TypeVar("T")


class ByLayer(Mapping[str, T], Generic[T]):
    """Layer name → what there is to say of it, not to be changed; a report adds its repr."""

    def __init__(self, layers: Mapping[str, T]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, layer: str) -> T:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title line, a header, and rows; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric))
        return "  ".join(cells).rstrip()

    return "\n".join([title, line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip(" %"))
    except ValueError:
        return text in ("", "-")
    return True
