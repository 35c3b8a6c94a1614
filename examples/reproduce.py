"""The paper's experiments: run what is missing, then tables and pictures from the lines alone.

    python examples/reproduce.py table5 --preset small --data DIR     # runs what is missing; stop and repeat at will
    python examples/reproduce.py table5 --preset small --plan         # what is missing, in order
    python examples/reproduce.py table5 --preset small --report       # tables and pictures, from the committed lines
    python examples/reproduce.py table5 --setting 0.1 5e-4 --data DIR # every arm at this rate and decay
    torchrun --nproc_per_node 8 examples/reproduce.py table5 --preset paper --archs resnet18_imagenet --data DIR

Experiments: table1 (radius), table2 (1/1 and 1/32 networks), table5 (on top of existing methods), fig3 (flips), fig4
(curves), fig5 (loss surfaces); ablation (what spectral points gain by) and search (a default among the choices that
the paper leaves open). They share their runs: what one has finished, another reads. Runs take up where they stopped, on
any machine that has the lines and, for the unfinished ones, the checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import World
from hosts import HOSTS
from hosts.networks import NETWORKS
from reproduction import ledger
from reproduction.arms import ARMS
from reproduction.experiments import EXPERIMENTS
from reproduction.pool import require_same_images, run_missing, run_together
from reproduction.presets import PRESETS
from reproduction.protocol import Lines
from reproduction.report import write_report
from reproduction.surfaces import missing_surfaces, run_surfaces

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    preset, experiment = PRESETS[args.preset], EXPERIMENTS[args.experiment]
    path = args.results / f"reproduce-{args.preset}.jsonl"
    surfaces = args.results / f"fig5-{args.preset}.jsonl" if args.experiment == "fig5" else None
    try:
        cases = experiment.cases(preset, args.hosts, args.archs)
        given = tuple(args.setting) if args.setting else None
        study = experiment.study(preset, cases, args.arms, args.seeds, given)
        if given and args.experiment == "search":
            raise ValueError("a search takes the setting at which the bare host does best: leave --setting out")
        comparison = experiment.search(preset, cases, args.arms) if args.experiment == "search" else study
        lines = Lines(ledger.read(path))
        if args.plan:
            for run in comparison.missing(lines):
                print(run)
            for pair in missing_surfaces(study, lines, surfaces) if surfaces else ():
                print("surface of", *pair)
            beyond = "" if given else ", and what tuning may ask for beyond"
            print(f"{comparison.epochs_left(lines):,} epochs{beyond}")
        elif args.report:
            name = "-".join([args.experiment, args.preset, *(f"{number:g}" for number in given or ())])
            write_report(args.experiment, comparison, lines, args.results / name, surfaces)
        else:
            require_same_images(path, (case.task.dataset for case in cases), args.data)
            world = World.from_environment()
            if world.size > 1:
                run_together(comparison, args.data, path, args.runs, world)
            else:
                run_missing(comparison, args.data, path, args.runs, args.jobs)
            world.close()
            if surfaces and world.rank == 0:
                run_surfaces(study, Lines(ledger.read(path)), args.data, surfaces, args.runs)
    except BrokenProcessPool:
        sys.exit(
            "reproduce.py: one of the processes that train was killed, perhaps for want of memory. Repeat the command, "
            "with --jobs 1 if need be: runs continue from their checkpoints"
        )
    except (ValueError, OSError) as error:
        sys.exit(f"reproduce.py: {error}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reproduce the paper's experiments.")
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--preset", choices=PRESETS, default="small", help="at which size (%(default)s)")
    add("--data", type=Path, help="folder of cifar-10-batches-bin, cifar-100-binary, or ImageNet's train and val")
    add("--hosts", nargs="+", choices=sorted(HOSTS), default=[], help="by default the experiment's own")
    add("--archs", nargs="+", choices=sorted(NETWORKS), default=[], help="by default the preset's own")
    add("--arms", nargs="+", choices=ARMS, default=[], metavar="ARM", help="by default the experiment's own")
    add("--setting", nargs=2, type=float, metavar=("LR", "DECAY"), help="of all arms; by default each is tuned")
    add("--seeds", type=int, default=0, help="fresh seeds; by default the preset's")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each (%(default)s); on a GPU they share it")
    add("--results", type=Path, default=RESULTS, help="folder of the finished runs' lines (%(default)s)")
    add("--runs", type=Path, default=Path("runs/reproduce"), help="folder of checkpoints and final weights")
    add("--plan", action="store_true", help="print what is missing and run nothing")
    add("--report", action="store_true", help="write tables and pictures from the lines and run nothing")
    args = parser.parse_args(argv)
    if args.data is None and not (args.plan or args.report):
        parser.error("--data DIR is needed to run what is missing; --plan and --report need none")
    return args


if __name__ == "__main__":
    main()
