"""Which reading of the paper's open choices was best under its own rule? The table of a finished comparison.

    python examples/defaults.py

An 8-layer ResNet (width 16) on 16 × 16 images, batch 128, 10 epochs of 15,000 training images; accuracy was read after
the last epoch on 5,000 other *training* images: the test set played no part in choosing. Every arm had the host's own
learning rate and weight decay, and the same initial weights and batches for the same seed. The lines in
``results/defaults.jsonl`` were made at commit df61969; ``reproduce.py search`` now asks more of the same question.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from markdown_tables import table

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
HOSTS = ("irnet", "recu")


def report(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: mean accuracy, and the paired difference to the default arm with its standard error.

    "default" was then the paper's own rule (``rule="mobius"``).
    """
    rows: list[list[str]] = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for host in HOSTS:
            mine = {line["seed"]: line for line in lines if line["arm"] == arm and line["host"] == host}
            base = {line["seed"]: line for line in lines if line["arm"] == "default" and line["host"] == host}
            cells += _cells(mine, base)
        rows.append([arm, *cells])
    columns = ("accuracy", "− default", "reach", "decided by p")
    return table(["arm", *(f"{host}: {column}" for host in HOSTS for column in columns)], rows)


def _cells(mine: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> list[str]:
    if not mine:
        return ["", "", "", ""]
    accuracies = [100 * line["accuracy"] for line in mine.values()]
    differences = [100 * (mine[s]["accuracy"] - base[s]["accuracy"]) for s in sorted(mine.keys() & base.keys())]
    difference = ""
    if any(differences):
        difference = f"{statistics.mean(differences):+.2f}"
        if len(differences) > 1:
            difference += f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.2f}"
    reach = [line["reach"] for line in mine.values() if "reach" in line]
    decided = [100 * line["disagreement"] for line in mine.values() if "disagreement" in line]
    return [
        f"{statistics.mean(accuracies):.2f} ({len(accuracies)})",
        difference,
        f"{statistics.mean(reach):.3f}" if reach else "",
        f"{statistics.mean(decided):.1f} %" if decided else "",
    ]


if __name__ == "__main__":
    print(report([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]))
