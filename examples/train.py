"""Train a binary network on CIFAR-10, bare or with HBNN.

    python examples/train.py --data DIR --host irnet --arch resnet20 --hbnn --out runs/irnet-hbnn

Interrupted at any moment, the same command continues. Continued or not, the final weights are the same, bit for bit
on a CPU with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import checkpoints
import cifar
import hbnn_plugin
from flips import MEAN, FlipMeter, comparison
from hosts import HOSTS, get_host
from hosts.networks import NETWORKS
from training import Progress, Recipe, accuracy, fit, make_optimizer, predict, progress_bar

if TYPE_CHECKING:
    from images import Images

CLUSTER_OPTIONS = {
    "space": (str, "ball (HBNN) or sphere (SBNN)"),
    "radius": (float, "the radius r of the space: r·‖x‖² < 1"),
    "per": (str, "one point a filter or a layer"),
    "rule": (str, "how points move: mobius, riemannian, riemannian-adam, spectral or fixed"),
    "order": (str, "simultaneous or alternating steps of points and weights"),
    "start": (float, "where points start: 0 at the origin, 1 at the weight"),
    "point_lr": (float, "the points' learning rate, as a multiple of a power of the weights'"),
    "point_lr_power": (float, "that power"),
    "point_momentum": (float, "momentum of the points"),
    "point_decay": (float, "decay of the points"),
}
"""Options of ``hbnn_plugin.apply``; left out, the library's own defaults hold."""

ARCHS = [name for name in sorted(NETWORKS) if not name.endswith("_imagenet")]


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    cluster = {name: getattr(args, name) for name in CLUSTER_OPTIONS if getattr(args, name) is not None}
    if args.relative:
        cluster["relative"] = True
    if cluster and not args.hbnn:
        given = ", ".join("--" + name.replace("_", "-") for name in cluster)
        parser.error(f"{given} changes HBNN's cluster, but HBNN is off; add --hbnn")
    if args.arch == "vgg_small" and args.size != 32:
        parser.error("vgg_small takes 32 x 32 images only; leave --size at 32")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        run(args, cluster)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


def run(args: argparse.Namespace, cluster: dict[str, Any]) -> dict[str, Any]:
    """Train (or continue), report, and write everything to ``args.out``; returns what ``result.json`` holds."""
    recipe = Recipe(args.epochs, args.batch_size, args.lr, args.momentum, args.weight_decay, args.seed)
    config = {
        **vars(recipe),
        **{name: getattr(args, name) for name in ("host", "arch", "size", "limit", "channels_last", "hbnn")},
        "cluster": cluster,
        "dataset_crc32": cifar.checksum(args.data),
    }
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train, test = (images.to(device) for images in cifar.load(args.data, args.size, args.limit))

    torch.manual_seed(args.seed)
    host = get_host(args.host, args.arch)
    model = NETWORKS[args.arch](host.conv)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.hbnn:
        hbnn_plugin.apply(model, **cluster)
    optimizer = make_optimizer(model, host, recipe)
    # Built from the seed, the model is at its start here, whether or not a checkpoint is loaded next.
    meter = FlipMeter(model)

    path = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    if args.fresh:
        for old in (path, args.out / "log.jsonl", args.out / "final.pt", args.out / "result.json"):
            old.unlink(missing_ok=True)
    elif path.exists():
        progress = _resume(path, config, model, optimizer)
        print(f"Continuing {args.out} at epoch {progress.epoch + 1}, step {progress.step}.", file=sys.stderr)

    def checkpoint(progress: Progress) -> None:
        content = {"config": config, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save(path, {**content, "progress": progress.state_dict()})
        # The checkpoint is the truth and the log a view of it, so the two never disagree after a kill.
        _write_log(args.out, progress)

    _write_log(args.out, progress)
    steps = train.steps(recipe.batch_size)
    done = min(progress.epoch * steps + progress.step, recipe.epochs * steps)
    with progress_bar(f"{args.host}{'+hbnn' if args.hbnn else ''}", recipe.epochs * steps, done) as bar:
        progress = fit(
            model, optimizer, host, train, test, recipe, meter, bar, progress, checkpoint, args.checkpoint_every
        )
    return _report(args, config, model, test, meter, progress)


def _resume(path: Path, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    saved = checkpoints.load(path)
    checkpoints.check_same(path, saved["config"], config)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return Progress(**saved["progress"])


def _write_log(out: Path, progress: Progress) -> None:
    checkpoints.write_text(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in progress.history))


def _report(
    args: argparse.Namespace,
    config: dict[str, Any],
    model: nn.Module,
    test: Images,
    meter: FlipMeter,
    progress: Progress,
) -> dict[str, Any]:
    flips = meter.ratios(model)
    result: dict[str, Any] = {
        "config": config,
        "test_accuracy": accuracy(model, test),
        "best_test_accuracy": max(record["test_accuracy"] for record in progress.history),
        "flip_ratio": flips[MEAN],
        "flip_ratios": {name: ratio for name, ratio in flips.items() if name != MEAN},
        "seconds": round(sum(record["seconds"] for record in progress.history), 1),
    }
    print(f"\nTest accuracy after epoch {progress.epoch}: {result['test_accuracy']:.2%}\n")
    print(comparison({args.host: flips}))
    if args.hbnn:
        report = hbnn_plugin.cluster_report(model)
        result["cluster"] = {
            name: {key: getattr(layer, key) for key in ("reach", "mean_reach", "disagreement")}
            for name, layer in report.items()
        }
        print(f"\n{report}")
        before = predict(model, test)
        hbnn_plugin.fuse(model)
        result["fused_difference"] = (predict(model, test) - before).abs().max().item()
        print(
            f"\nFused into the plain {args.host} network; its logits differ by {result['fused_difference']:g} at most."
        )
        if result["fused_difference"] > 1e-3:
            raise ValueError("the fused network does not compute what the trained one does; final.pt was not written")
    checkpoints.save(args.out / "final.pt", model.state_dict())
    checkpoints.write_text(args.out / "result.json", json.dumps(result, indent=2) + "\n")
    print(f"Wrote {args.out / 'final.pt'}, {args.out / 'result.json'} and {args.out / 'log.jsonl'}.")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a binary network on CIFAR-10, bare or with HBNN. The same command continues a stopped run."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that is or contains cifar-10-batches-bin")
    add(
        "--out",
        type=Path,
        default=Path("runs/latest"),
        help="folder for checkpoint, log, final weights and result (%(default)s)",
    )
    add("--host", choices=sorted(HOSTS), default="irnet", help="which binary convolution (%(default)s)")
    add(
        "--arch",
        choices=ARCHS,
        default="resnet20",
        help="which network (%(default)s)",
    )
    add("--epochs", type=_positive, default=120, help="epochs of the cosine schedule (%(default)s)")
    add("--batch-size", type=_positive, default=128, help="images a step (%(default)s)")
    add("--lr", type=float, default=0.1, help="learning rate at the start (%(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (%(default)s)")
    add(
        "--weight-decay",
        type=float,
        default=5e-4,
        help="of all parameters; SiMaN and MD-tanh leave latent weights out (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of initial weights, batches and augmentation (%(default)s)")
    add("--limit", type=_positive, help="use only so many training and test images")
    add(
        "--size", type=int, choices=(16, 32), default=32, help="image size; 16 averages over 2 x 2 pixels (%(default)s)"
    )
    add("--device", help="such as cpu or cuda:1; by default a GPU if there is one")
    add("--threads", type=_positive, help="CPU threads; by default torch's own choice")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format; faster on CPUs")
    add("--checkpoint-every", type=_positive, metavar="STEPS", help="checkpoint within epochs too")
    add("--fresh", action="store_true", help="discard a checkpoint in --out and start over")
    hbnn = parser.add_argument_group("HBNN", "With --hbnn; options left out keep the library's defaults.")
    hbnn.add_argument("--hbnn", action="store_true", help="apply hbnn_plugin to the binary layers")
    hbnn.add_argument("--relative", action="store_true", help="measure each weight in units of its own length")
    for name, (kind, text) in CLUSTER_OPTIONS.items():
        hbnn.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    main()
