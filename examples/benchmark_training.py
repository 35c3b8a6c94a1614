"""What the plugin costs in training: the map alone, whole steps, kernels, memory, and how the cost grows.

    python examples/benchmark_training.py            # measures what has no line yet; stop and repeat at will
    python examples/benchmark_training.py --report   # tables, from the committed lines alone
    python examples/benchmark_training.py --only map --again

Everything is measured in turns in one process (``measuring.py``); the tables give ratios within a turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from provenance import circumstances
from reproduction import ledger
from training_cost.cases import CASES
from training_cost.tables import report

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results"
SECTIONS = ("map", "step", "launches", "memory", "growth")


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    path = args.results / "training-cost.jsonl"
    try:
        lines = ledger.read(path)
        if args.report:
            target = path.with_suffix(".md")
            target.write_text(report(lines), encoding="utf-8")
            print(target)
            return
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark_training.py: {error}")
    torch.set_num_threads(args.threads)
    due = [case for case in CASES if case.section in args.only and any(part in case.name for part in args.cases)]
    done: set[Any] = set() if args.again else {(line["section"], line["case"]) for line in lines}
    due = [case for case in due if (case.section, case.name) not in done]
    with tqdm(due, unit="case", dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_postfix_str(f"{case.section}: {case.name}")
            figures = case.measure(args.turns or case.turns)
            ledger.append(path, {"section": case.section, "case": case.name, **figures, **circumstances(args.threads)})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the plugin costs in training.")
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    add("--cases", nargs="+", default=[""], help="only cases whose name holds one of these")
    add("--turns", type=int, default=0, help="turns a case; by default its own")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--again", action="store_true", help="measure again what has a line; the last line counts")
    add("--results", type=Path, default=RESULTS, help="folder of the lines (%(default)s)")
    add("--report", action="store_true", help="write the tables from the lines and measure nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
