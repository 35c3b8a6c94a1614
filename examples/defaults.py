"""Which reading of the paper's open choices is best under its own rule? A comparison on CIFAR-10's training images.

    python examples/defaults.py --data DIR        # runs what is missing, two at a time, then prints the table
    python examples/defaults.py --report          # the table, from the committed results alone

An 8-layer ResNet (width 16) on 16 × 16 images, batch 128, 10 epochs of 15,000 training images; accuracy is read after
the last epoch on 5,000 other *training* images: the test set plays no part in choosing. Every arm has the host's own
learning rate and weight decay, and the same initial weights and batches for the same seed. This compares readings with
each other; whether any of them helps a well-tuned host is another question, which 10 epochs do not answer.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import checkpoints
import cifar
import hbnn_plugin
from flips import MEAN, FlipMeter
from hosts import get_host
from hosts.networks import NETWORKS
from training import Recipe, accuracy, fit, make_optimizer

if TYPE_CHECKING:
    from images import Images

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
TRAINING, VALIDATION = 15_000, 5_000
RECIPE = Recipe(epochs=10, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4)

LITERAL: dict[str, Any] = {"rule": "mobius", "point_lr": 1.0}
"""The paper's own rule, which was the library's default then."""

ARMS: dict[str, dict[str, Any] | None] = {
    "bare host": None,
    "default": LITERAL,
    "per layer": {**LITERAL, "per": "layer"},
    "riemannian": {**LITERAL, "rule": "riemannian"},
    "alternating": {**LITERAL, "order": "alternating"},
    "relative": {**LITERAL, "relative": True},
    "relative, per layer": {**LITERAL, "relative": True, "per": "layer"},
    "start .5": {**LITERAL, "start": 0.5},
    "point_lr .3": {**LITERAL, "point_lr": 0.3},
    "point_lr 3": {**LITERAL, "point_lr": 3.0},
    "point_momentum .9, point_lr .1": {**LITERAL, "point_momentum": 0.9, "point_lr": 0.1},
    "point_decay 5e-4": {**LITERAL, "point_decay": 5e-4},
    "fixed, start .5": {**LITERAL, "rule": "fixed", "start": 0.5},
    "Euclidean (radius 1e-12)": {**LITERAL, "radius": 1e-12},
    "sphere": {**LITERAL, "space": "sphere"},
}
"""Name → options of ``hbnn_plugin.apply``; None is the host without the plugin."""

HOSTS = ("irnet", "recu")


@cache
def _images(data: Path) -> tuple[Images, Images]:
    train, _ = cifar.load(data, size=16)
    part = replace(train, pixels=train.pixels[:TRAINING], labels=train.labels[:TRAINING])
    held_out = slice(len(train) - VALIDATION, len(train))
    return part, replace(train, pixels=train.pixels[held_out], labels=train.labels[held_out], shift=0, flip=False)


def run(data: Path, host_name: str, arm: str, seed: int) -> dict[str, Any]:
    """One training; the record that becomes a line of the results."""
    torch.set_num_threads(1)
    train, validation = _images(data)
    torch.manual_seed(seed)
    host = get_host(host_name, "resnet8")
    model = NETWORKS["resnet8"](host.conv).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    options = ARMS[arm]
    if options is not None:
        hbnn_plugin.apply(model, **options)
    recipe = replace(RECIPE, seed=seed)
    optimizer = make_optimizer(model, host, recipe)
    meter = FlipMeter(model)
    with tqdm(disable=True) as bar:
        progress = fit(model, optimizer, host, train, validation, recipe, meter, bar)
    record: dict[str, Any] = {"host": host_name, "arm": arm, "seed": seed, "options": options}
    record["accuracy"] = accuracy(model, validation)
    record["flip_ratio"] = meter.ratios(model)[MEAN]
    record["train_loss"] = progress.history[-1]["train_loss"]
    record["seconds"] = round(sum(epoch["seconds"] for epoch in progress.history), 1)
    if options is not None:
        report = hbnn_plugin.cluster_report(model)
        record["reach"] = max(layer.reach for layer in report.values())
        record["mean_reach"] = statistics.mean(layer.mean_reach for layer in report.values())
        record["disagreement"] = statistics.mean(layer.disagreement for layer in report.values())
    return record


def report(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: mean accuracy, and the paired difference to the default arm with its standard error."""
    rows = ["| arm | " + " | ".join(f"{h}: accuracy | − default | reach | decided by p" for h in HOSTS) + " |"]
    rows.append("|---|" + "---|" * (4 * len(HOSTS)))
    for arm in ARMS:
        cells = []
        for host in HOSTS:
            mine = {line["seed"]: line for line in lines if line["arm"] == arm and line["host"] == host}
            base = {line["seed"]: line for line in lines if line["arm"] == "default" and line["host"] == host}
            cells += _cells(mine, base)
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cells(mine: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> list[str]:
    if not mine:
        return ["", "", "", ""]
    accuracies = [100 * line["accuracy"] for line in mine.values()]
    differences = [100 * (mine[s]["accuracy"] - base[s]["accuracy"]) for s in sorted(mine.keys() & base.keys())]
    difference = ""
    if differences and mine is not base and any(differences):
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare readings of the paper's open choices.")
    parser.add_argument("--data", type=Path, help="folder that is or contains cifar-10-batches-bin")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0, 1, ... of each arm (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (%(default)s)")
    parser.add_argument("--report", action="store_true", help="print the table and run nothing")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if not args.report:
        if args.data is None:
            parser.error("--data DIR is needed to run what is missing; --report needs none")
        done = {(line["host"], line["arm"], line["seed"]) for line in lines}
        wanted = [(host, arm, seed) for seed in range(args.seeds) for arm in ARMS for host in HOSTS]
        missing = [key for key in wanted if key not in done]
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), desc="runs", unit="run") as bar:
            for future in as_completed([pool.submit(run, args.data, *key) for key in missing]):
                lines.append(future.result())
                checkpoints.write_text(args.results, "".join(json.dumps(line) + "\n" for line in lines))
                bar.update()
    if not lines:
        sys.exit(f"defaults.py: no results in {args.results}; run with --data DIR first")
    print(report(lines))


if __name__ == "__main__":
    main()
