"""At which size the experiments run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Network, images and schedule, the same for every arm."""

    arch: str
    size: int
    epochs: int
    batch_size: int
    short_epochs: int
    """Of the first tuning round, which sees the whole grid."""
    learning_rates: tuple[float, ...] = (0.1, 0.3, 0.6)
    weight_decays: tuple[float, ...] = (1e-4, 2e-4, 5e-4)
    finalists: int = 2
    """Points of the grid that reach the second tuning round, of the full length."""
    seeds: int = 5
    """Fresh seeds on the test set."""
    limit: int | None = None
    """Use only so many images."""
    compiled: bool = True
    """Whether the networks train under ``torch.compile``."""


PRESETS = {
    "smoke": Preset("resnet8", 16, 2, 32, 1, (0.1, 0.3), (5e-4,), finalists=1, seeds=2, limit=160, compiled=False),
    "small": Preset(arch="resnet8", size=16, epochs=40, batch_size=128, short_epochs=10),
}
