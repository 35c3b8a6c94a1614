"""How long inference takes, in torch and in OpenVINO, and whether all compute the same (Fig. 6).

    python examples/benchmark_latency.py --quick              # one case, a minute
    python examples/benchmark_latency.py                      # what has no line yet; stop and repeat at will
    python examples/benchmark_latency.py --equality DIR       # trains on CIFAR-10 in DIR, compares on its test images
    python examples/benchmark_latency.py --report             # tables and picture, from the committed lines alone

Everything runs in turns in one process (``measuring.py``); ratios are taken within a turn. Needs openvino; int8 needs
nncf (the extra ``int8``) and is left out without it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads must not spin in another's turn

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import checkpoints
from latency.cases import EQUALITY, INFERENCE
from latency.report import draw, tables
from provenance import circumstances
from reproduction import ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    path = args.results / "latency.jsonl"
    try:
        lines = ledger.read(path)
        if args.report:
            checkpoints.write_text(path.with_suffix(".md"), tables(lines))
            draw(lines, path.with_suffix(".png"))
            print(path.with_suffix(".md"))
            return
        _measure(args, path, {(line["section"], line["case"]) for line in lines})
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark_latency.py: {error}")


def _measure(args: argparse.Namespace, path: Path, done: set[tuple[str, str]]) -> None:
    due: list[tuple[str, Any]] = [("inference", case) for case in INFERENCE[: 1 if args.quick else None]]
    if args.equality:
        due = [("equality", case) for case in EQUALITY]
    due = [(section, case) for section, case in due if any(part in case.name for part in args.cases)]
    due = [(section, case) for section, case in due if args.again or (section, case.name) not in done]
    with tqdm(due, unit="case", dynamic_ncols=True) as bar:
        for section, case in bar:
            bar.set_postfix_str(f"{section}: {case.name}")
            if section == "inference":
                figures = {"network": str(case.network), "batch": case.batch, **case.measure(args.seconds)}
            else:
                figures = case.measure(args.equality, args.runs)
            threads = getattr(case, "threads", torch.get_num_threads())
            line = {"section": section, "case": case.name, "threads": threads, **figures, **circumstances(threads)}
            ledger.append(path, line | _versions())


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("openvino", "nncf") if importlib.util.find_spec(name)}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure latency in torch and OpenVINO.")
    add = parser.add_argument
    add("--quick", action="store_true", help="only the first case")
    add("--cases", nargs="+", default=[""], help="only cases whose name holds one of these")
    add("--equality", type=Path, metavar="DIR", help="compare outputs on CIFAR-10 in DIR; trains networks if needed")
    add("--seconds", type=float, default=60, help="about how long an inference case takes its turns (%(default)s)")
    add("--again", action="store_true", help="measure again what has a line; the last line counts")
    add("--results", type=Path, default=RESULTS, help="folder of the lines (%(default)s)")
    add("--runs", type=Path, default=Path("runs/latency"), help="folder of trained weights (%(default)s)")
    add("--report", action="store_true", help="write tables and picture from the lines and measure nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
