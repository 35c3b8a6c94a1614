"""What is missing, run: several runs at a time in processes of their own, or one on all of torchrun's processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol

from torch import distributed
from tqdm import tqdm  # type: ignore[import-untyped]

from locks import occupied
from reproduction import ledger
from reproduction.protocol import Lines
from reproduction.runs import Run, checkpoint_path, checksum, execute

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from distributed import World

__all__ = ["Comparison", "require_same_images", "run_missing", "run_together"]


class Comparison(Protocol):
    """What knows which runs it needs."""

    def missing(self, lines: Lines) -> Sequence[Run]: ...

    def epochs_left(self, lines: Lines) -> int: ...


_epochs: Any = None
"""In a worker: where it says that an epoch is done."""


def _start_worker(epochs: Any) -> None:
    global _epochs  # noqa: PLW0603
    _epochs = epochs
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves its workers behind; two processes must never train into one checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Run, data: Path, folder: Path) -> dict[str, Any]:
    return execute(run, data, folder, lambda: _epochs.put(1))


def require_same_images(ledger_path: Path, datasets: Iterable[str], data: Path) -> None:
    """Raise ValueError if the file's lines of these datasets come from other images than those in ``data``.

    Copies of CIFAR-10 differ by points of accuracy: some went through JPEG.
    """
    for dataset in sorted(set(datasets)):
        mine = checksum(dataset, data)
        lines = [line for line in ledger.read(ledger_path) if line["config"]["dataset"] == dataset]
        others = sorted({line["dataset_crc32"] for line in lines} - {mine})
        if others:
            raise ValueError(
                f"{ledger_path} has {len(lines)} runs on another copy of {dataset} (CRC-32 {', '.join(others)}; "
                f"{data} has {mine}). Arms that saw different images must not be compared: "
                "give --results a folder of your own."
            )


def run_missing(comparison: Comparison, data: Path, ledger_path: Path, folder: Path, jobs: int) -> None:
    """Run until nothing is missing, ``jobs`` at a time; every finished run is a line at once.

    The first error of a run is told at once and raised when the others that have begun are done.
    """
    lines = ledger.read(ledger_path)
    context = multiprocessing.get_context("spawn")
    epochs = context.SimpleQueue()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(epochs,))
    finished_epochs = 0
    with (
        occupied(folder),
        pool,
        tqdm(total=comparison.epochs_left(Lines(lines)), unit="epoch", dynamic_ncols=True) as bar,
    ):
        running: dict[Future[dict[str, Any]], Run] = {}
        error: BaseException | None = None
        missing = comparison.missing(Lines(lines))
        while True:
            started = {run.key for run in running.values()}
            for run in missing:
                if len(running) == jobs or error:
                    break
                if run.key not in started:
                    running[pool.submit(_work, run, data, folder)] = run
                    started.add(run.key)
            if not running:
                break
            finished, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
            while not epochs.empty():
                bar.update(epochs.get())
            for future in finished:
                run = running.pop(future)
                if failure := future.exception():
                    bar.write(f"{run}: {failure}")
                    error = error or failure
                    continue
                line = future.result()
                lines.append(line)
                finished_epochs += run.recipe.epochs
                bar.total = finished_epochs + comparison.epochs_left(Lines(lines))
                bar.write(_finish(run, line, data, ledger_path, folder))
            if finished:
                missing = comparison.missing(Lines(lines))
        if error:
            raise error


def run_together(comparison: Comparison, data: Path, ledger_path: Path, folder: Path, world: World) -> None:
    """Run until nothing is missing, one run at a time on all ranks of ``world``; each of them calls this."""
    lines = ledger.read(ledger_path)
    total = comparison.epochs_left(Lines(lines))
    alone = occupied(folder) if world.rank == 0 else contextlib.nullcontext()
    with alone, tqdm(total=total, unit="epoch", dynamic_ncols=True, disable=world.rank > 0) as bar:
        while missing := comparison.missing(Lines(lines)):
            line = execute(missing[0], data, folder, bar.update, world)
            lines.append(line)
            if world.rank == 0:
                bar.write(_finish(missing[0], line, data, ledger_path, folder))
            distributed.barrier()  # a run's checkpoint is gone before anyone looks for the next one's


def _finish(run: Run, line: dict[str, Any], data: Path, ledger_path: Path, folder: Path) -> str:
    """The line is written, then the checkpoint goes; returns what to tell."""
    ledger.append(ledger_path, line)
    checkpoint_path(run, data, folder).unlink(missing_ok=True)
    return f"{run}: {line.get('diverged') or format(line['accuracy'][-1], '.2%')}"
