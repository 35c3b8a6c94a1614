"""Tables in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["interval", "table"]


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table, without a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def interval(estimate: Mapping[str, float] | None) -> str:
    """A line's median with its interval, or nothing."""
    if estimate is None:
        return ""
    numbers = (estimate[name] for name in ("median", "low", "high"))
    median, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers)
    return f"{median} ({low} … {high})"
