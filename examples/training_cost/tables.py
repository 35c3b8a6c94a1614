"""Markdown tables from the lines alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markdown_tables import interval, table
from provenance import by_processor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["report"]

_HEAD = """# What the plugin costs in training

Made by `python examples/benchmark_training.py --report` from `training-cost.jsonl`. Medians over turns in one
process, with 95 % bootstrap intervals; ratios are taken within a turn. A "+" behind a commit: with uncommitted changes.
"""


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """All sections by processor, of each case its last line there."""
    parts = [_HEAD]
    for section, tabulated in (
        ("map", _map),
        ("growth", _map),
        ("step", _step),
        ("launches", _launches),
        ("memory", _memory),
    ):
        for i, measured in enumerate(by_processor(line for line in lines if line["section"] == section).values()):
            found = [*{line["case"]: line for line in measured}.values()]
            parts += [_TITLES[section]] * (i == 0) + [tabulated(found) + "\n", _machines(found)]
    return "\n".join(parts)


_TITLES = {
    "map": "## The map alone, forward and backward\n\nThe floor is what copying as many bytes takes as have to move.\n",
    "growth": "## How its cost grows\n\nHere no compiled variants run between the turns, and geoopt is faster than "
    "above at 2.36 M weights: compare within a table.\n",
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
        ratios = [line["geoopt / plugin"], floor["plugin"]]
        ratios += [floor.get("plugin, compiled")] * ("plugin, compiled" in arms)
        rows.append([line["case"], *map(interval, [*map(line["milliseconds"].get, arms), *ratios])])
    return table(header, rows)


def _step(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["ratio to the bare host"])
    header = ["case", "bare host, ms", *arms]
    rows = [
        [
            line["case"],
            interval(line["milliseconds"]["bare host"]),
            *(interval(line["ratio to the bare host"][a]) for a in arms),
        ]
        for line in lines
    ]
    return table(header, rows)


def _launches(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["launches"])
    rows = []
    for line in lines:
        counts = {arm: [*passes.values()] for arm, passes in line["launches"].items()}
        bare, *others = (sum(counts[arm]) for arm in arms)
        cells = [f"{' + '.join(map(str, counts[arm]))} = {sum(counts[arm])}" for arm in arms]
        rows.append([line["case"], *cells, *(f"{other / bare:.2f}" for other in others)])
    return table(["case", *arms, *(f"{arm} / {arms[0]}" for arm in arms[1:])], rows)


def _memory(lines: Sequence[Mapping[str, Any]]) -> str:
    arms = list(lines[0]["copies held"])
    header = ["case", "weights, MB", *(f"held, {arm}" for arm in arms), *(f"peak, {arm}" for arm in arms)]
    rows = [
        [line["case"], f"{line['weights, MB']}"]
        + [f"{line[kind][arm]:.2f}" for kind in ("copies held", "copies at the peak") for arm in arms]
        for line in lines
    ]
    return table(header, rows)


def _machines(lines: Sequence[Mapping[str, Any]]) -> str:
    found = {f"{line['machine']}; torch {line['torch']}, commit {line['commit']}" for line in lines}
    return "\n".join(f"* {machine}" for machine in sorted(found)) + "\n"
