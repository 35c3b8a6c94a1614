"""Markdown tables from the lines alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import by_processor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["report"]

TRIED = Path(__file__).parent / "tried.md"
"""What no benchmark repeats."""

_HEAD = """# What the plugin costs in training

Made by `python examples/benchmark_training.py --report` from `training-cost.jsonl`. Medians over turns in one
process, with 95 % bootstrap intervals; ratios are taken within a turn.
"""


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """All sections by processor, of each case its last line there."""
    parts = [_HEAD]
    for section, table in (
        ("map", _map),
        ("growth", _map),
        ("step", _step),
        ("launches", _launches),
        ("memory", _memory),
    ):
        for i, measured in enumerate(by_processor(line for line in lines if line["section"] == section).values()):
            found = [*{line["case"]: line for line in measured}.values()]
            parts += [_TITLES[section]] * (i == 0) + [table(found), _machines(found)]
    parts.append(TRIED.read_text(encoding="utf-8"))
    return "\n".join(parts)


_TITLES = {
    "map": "## The map alone, forward and backward\n\nThe floor is what copying as many bytes takes as have to move.\n",
    "growth": "## How its cost grows\n",
    "step": "## A training step, as a multiple of the bare host's\n",
    "launches": "## Operators of a training step that compute something: on a GPU, kernels to launch\n\n"
    "Forward + backward + optimizer step, counted on torch's meta device, whose tensors have no values.\n",
    "memory": "## Memory beyond the bare host's, in copies of the binary layers' weights\n",
}


def _map(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(dict.fromkeys(arm for line in lines for arm in line["milliseconds"]))
    header = ["case", *(f"{arm}, ms" for arm in arms), "geoopt / plugin", "plugin / floor"]
    header += ["plugin, compiled / floor"] * ("plugin, compiled" in arms)
    rows = []
    for line in lines:
        floor = line["ratio to the floor"]
        rows.append(
            [line["case"], *(_cell(line["milliseconds"].get(arm)) for arm in arms), _cell(line["geoopt / plugin"])]
            + [_cell(floor["plugin"])]
            + [_cell(floor.get("plugin, compiled"))] * ("plugin, compiled" in arms)
        )
    return _table(header, rows)


def _step(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["ratio to the bare host"])
    header = ["case", "bare host, ms", *arms]
    rows = [
        [
            line["case"],
            _cell(line["milliseconds"]["bare host"]),
            *(_cell(line["ratio to the bare host"][a]) for a in arms),
        ]
        for line in lines
    ]
    return _table(header, rows)


def _launches(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["launches"])
    rows = []
    for line in lines:
        counts = {arm: [*passes.values()] for arm, passes in line["launches"].items()}
        bare, *others = (sum(counts[arm]) for arm in arms)
        cells = [f"{' + '.join(map(str, counts[arm]))} = {sum(counts[arm])}" for arm in arms]
        rows.append([line["case"], *cells, *(f"{other / bare:.2f}" for other in others)])
    return _table(["case", *arms, *(f"{arm} / {arms[0]}" for arm in arms[1:])], rows)


def _memory(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["copies held"])
    header = ["case", "weights, MB", *(f"held, {arm}" for arm in arms), *(f"peak, {arm}" for arm in arms)]
    rows = [
        [line["case"], f"{line['weights, MB']}"]
        + [f"{line[kind][arm]:.2f}" for kind in ("copies held", "copies at the peak") for arm in arms]
        for line in lines
    ]
    return _table(header, rows)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    median, low, high = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (estimate[k] for k in ("median", "low", "high"))
    )
    return f"{median} ({low} … {high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _machines(lines: Sequence[Mapping[str, Any]]) -> str:
    found = {f"{line['machine']}; torch {line['torch']}, commit {line['commit']}" for line in lines}
    return "\n".join(sorted(found)) + "\n"
