"""HBNN in under a minute: one small binary network on handwritten digits, trained without and with the plugin.

    python examples/quickstart.py

Both runs start from the same weights and see the same batches. It needs scikit-learn (for the digits) and matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

import hbnn_plugin
from flips import FlipMeter, comparison
from hosts import HOSTS
from hosts.networks import resnet8
from images import Images
from training import Recipe, fit, make_optimizer, predict, progress_bar

if TYPE_CHECKING:
    from torch import nn
    from tqdm import tqdm  # type: ignore[import-untyped]

TEST_IMAGES = 450
BARE, HBNN = "bare", "with HBNN"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small binary network on digits without and with HBNN.")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="where the picture goes (%(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs is {args.epochs}; at least one is needed")
    # So small a network gains little from more threads, and loses much where the cores are shared.
    torch.set_num_threads(1)
    recipe = Recipe(epochs=args.epochs, batch_size=64, seed=args.seed)
    train, test = digits()

    accuracies: dict[str, list[float]] = {}
    flips: dict[str, dict[str, float]] = {}
    with progress_bar("", 2 * recipe.epochs * train.steps(recipe.batch_size)) as bar:
        for title in (BARE, HBNN):
            bar.set_description(title)
            model, accuracies[title], flips[title] = run(recipe, train, test, hbnn=title == HBNN, bar=bar)

    print(f"\n{len(test)} test images, accuracy after {recipe.epochs} epochs")
    for title, values in accuracies.items():
        print(f"  {title:10} {values[-1]:.1%}")
    print("This is one seed on a small test set: two such runs differ by two or three points by chance.\n")
    print(comparison(flips))

    trained = predict(model, test)
    hbnn_plugin.fuse(model)
    difference = (predict(model, test) - trained).abs().max().item()
    if difference > 1e-3:
        raise SystemExit(f"the fused network's outputs differ from the trained one's by {difference:g}")
    print(f"\nFused into a plain network; its outputs differ from the trained one's by {difference:g} at most.")
    picture(args.out, accuracies, flips)
    print(f"Picture: {args.out}")


def digits() -> tuple[Images, Images]:
    """The 1797 digits of scikit-learn, 8 × 8 pixels; the last 450 are for testing."""
    data = load_digits()
    pixels = (torch.from_numpy(data.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    train, test = (
        Images(pixels[part], labels[part], mean=(0.3,), std=(0.38,))
        for part in (slice(None, -TEST_IMAGES), slice(-TEST_IMAGES, None))
    )
    return train, test


def run(
    recipe: Recipe, train: Images, test: Images, hbnn: bool, bar: tqdm
) -> tuple[nn.Module, list[float], dict[str, float]]:
    """Train one network; returns it with its test accuracies by epoch and its flip ratios by layer."""
    torch.manual_seed(recipe.seed)
    host = HOSTS["irnet"]
    model = resnet8(host.conv, in_channels=1)
    if hbnn:
        hbnn_plugin.apply(model)  # the one line that differs
    meter = FlipMeter(model)
    progress = fit(model, make_optimizer(model, host, recipe), host, train, test, recipe, meter, bar)
    return model, [record["test_accuracy"] for record in progress.history], meter.ratios(model)


def picture(out: Path, accuracies: dict[str, list[float]], flips: dict[str, dict[str, float]]) -> None:
    """Test accuracy over epochs, and flip ratios by layer."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for title, values in accuracies.items():
        left.plot(range(1, len(values) + 1), [100 * v for v in values], label=title)
    left.set(xlabel="epoch", ylabel="test accuracy (%)", title="IR-Net, 8-layer ResNet, 8 × 8 digits")
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    for i, (title, ratios) in enumerate(flips.items()):
        positions = [j + 0.4 * (i - 0.5) for j in range(len(ratios))]
        right.bar(positions, [100 * r for r in ratios.values()], width=0.4, label=title)
    right.set_xticks(range(len(ratios)), list(ratios), rotation=30, ha="right")
    right.set(ylabel="weights flipped since the start (%)", title="Flip ratio by layer")
    right.margins(y=0.2)
    right.legend(loc="upper left", ncols=2)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
