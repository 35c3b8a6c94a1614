"""Lines of runs that never ran, for tests of what is made from them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from reproduction.protocol import Lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from reproduction.pool import Comparison
    from reproduction.runs import Run

__all__ = ["finish", "line"]

LAYERS = ("stages.0.0.conv1", "stages.1.0.conv1")


def line(run: Run, accuracy: float) -> dict[str, Any]:
    """As `reproduction.runs.execute` writes it, with the accuracy rising to the one given, no epoch like another."""
    epochs = run.recipe.epochs
    return {
        "config": json.loads(json.dumps(run.config)),
        "accuracy": [accuracy * (epoch + 1) / epochs for epoch in range(epochs)],
        "train_loss": [2.0 - 0.01 * (epoch + 1) for epoch in range(epochs)],
        "flip_ratio": [0.01 * (epoch + 1) for epoch in range(epochs)],
        "flip_ratios": {
            layer: [0.01 * (epoch + 1) + 0.1 * place for epoch in range(epochs)] for place, layer in enumerate(LAYERS)
        },
        "oscillation": [0.1 / (epoch + 1) for epoch in range(epochs)],
        **({"reach": 0.25} if run.options else {}),
    }


def finish(comparison: Comparison, accuracy: Callable[[Run], float]) -> list[dict[str, Any]]:
    """The lines of a whole comparison whose runs end with these accuracies."""
    done: list[dict[str, Any]] = []
    while missing := comparison.missing(Lines(done)):
        done += [line(run, accuracy(run)) for run in missing]
    assert comparison.epochs_left(Lines(done)) == 0
    return done
