"""The paper's experiments (Table V so far): run what is missing, then tables and pictures from the lines alone.

    python examples/reproduce.py table5 --preset small --data DIR     # runs what is missing; stop and repeat at will
    python examples/reproduce.py table5 --preset small --plan         # what is missing, in order
    python examples/reproduce.py table5 --preset small --report       # tables and pictures, from the committed lines

Runs take up where they stopped, on any machine that has the lines and, for the unfinished ones, the checkpoints.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

import checkpoints
from hosts import HOSTS
from reproduction import ledger
from reproduction.arms import ARMS
from reproduction.experiments import Lines, Study
from reproduction.presets import PRESETS
from reproduction.report import draw_differences, table, tuning_table
from reproduction.runs import Run, execute

RESULTS = Path(__file__).parent / "results"

_epochs: Any = None
"""In a worker: where it says that an epoch is done."""


def _start_worker(epochs: Any, parent: int) -> None:
    global _epochs  # noqa: PLW0603
    _epochs = epochs
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent leaves its workers behind; two of them must never train into one checkpoint."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(run: Run, data: Path, folder: Path) -> dict[str, Any]:
    return execute(run, data, folder, lambda: _epochs.put(1))


def run_missing(study: Study, data: Path, ledger_path: Path, folder: Path, jobs: int) -> None:
    """Run until nothing is missing, ``jobs`` at a time; every finished run is a line at once."""
    lines = ledger.read(ledger_path)
    context = multiprocessing.get_context("spawn")
    epochs = context.Manager().Queue()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(epochs, os.getpid()))
    with pool, tqdm(total=study.epochs_left(Lines(lines)), unit="epoch", dynamic_ncols=True) as bar:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            started = {run.key for run in running.values()}
            for run in study.missing(Lines(lines)):
                if len(running) == jobs:
                    break
                if run.key not in started:
                    running[pool.submit(_work, run, data, folder)] = run
                    started.add(run.key)
            if not running:
                return
            finished, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
            while not epochs.empty():
                bar.update(epochs.get())
            for future in finished:
                run = running.pop(future)
                line = future.result()
                ledger.append(ledger_path, line)
                lines.append(line)
                (folder / f"{run.key}.pt").unlink(missing_ok=True)
                bar.write(f"{run}: {line.get('diverged') or format(line['accuracy'][-1], '.2%')}")


def write_report(study: Study, lines: Lines, path: Path) -> None:
    """``path`` with .md and .png; the tables are printed too."""
    text = f"{table(study, lines)}\n\nTuning: accuracy on held-out images after the short round → the full one, in %, "
    text += f"by learning rate and decay.\n\n{tuning_table(study, lines)}\n"
    checkpoints.write_text(path.with_suffix(".md"), text)
    draw_differences(study, lines, path.with_suffix(".png"))
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reproduce the paper's experiments.")
    add = parser.add_argument
    add("experiment", choices=("table5",))
    add("--preset", choices=sorted(PRESETS), default="small", help="at which size (%(default)s)")
    add("--data", type=Path, help="folder that is or contains cifar-10-batches-bin")
    add("--hosts", nargs="+", choices=sorted(HOSTS), default=["irnet", "recu"], help="(%(default)s)")
    add("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS), metavar="ARM", help="by default all")
    add("--seeds", type=int, help="fresh seeds; by default the preset's")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (%(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder of the finished runs' lines (%(default)s)")
    add("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the unfinished runs' checkpoints")
    add("--plan", action="store_true", help="print what is missing and run nothing")
    add("--report", action="store_true", help="write tables and pictures from the lines and run nothing")
    args = parser.parse_args(argv)
    if args.data is None and not (args.plan or args.report):
        parser.error("--data DIR is needed to run what is missing; --plan and --report need none")
    preset = PRESETS[args.preset]
    study = Study(preset, args.hosts, {arm: ARMS[arm] for arm in args.arms}, args.seeds or preset.seeds)
    path = args.results / f"reproduce-{args.preset}.jsonl"
    try:
        if args.plan:
            for run in study.missing(Lines(ledger.read(path))):
                print(run)
        elif args.report:
            write_report(study, Lines(ledger.read(path)), args.results / f"{args.experiment}-{args.preset}")
        else:
            run_missing(study, args.data, path, args.runs, args.jobs)
    except (ValueError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")


if __name__ == "__main__":
    main()
