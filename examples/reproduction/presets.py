"""At which size the experiments run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

__all__ = ["PRESETS", "Preset", "Task"]


@dataclass(frozen=True)
class Task:
    """Network, images and schedule, the same for every arm."""

    dataset: str
    """cifar10, cifar100 or imagenet."""
    arch: str
    size: int
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    wider: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Further learning rates and weight decays that tuning may reach from its best point."""
    finalists: int = 3
    """Settings that all tuning seeds decide between."""
    tuning_seeds: int = 3
    readout: int = 1
    """Accuracy is the mean over so many last epochs."""
    limit: int | None = None
    """Use only so many images."""

    @property
    def grid(self) -> list[tuple[float, float]]:
        """The settings, learning rate and weight decay, that tuning tries; a single one is not tuned."""
        return list(product(self.learning_rates, self.weight_decays))

    @property
    def reachable(self) -> list[tuple[float, float]]:
        """The grid with what lies beyond it."""
        return list(product(*self._ladders))

    @property
    def _ladders(self) -> tuple[list[float], list[float]]:
        rates, decays = self.wider
        return sorted({*self.learning_rates, *rates}), sorted({*self.weight_decays, *decays})

    def neighbours(self, lr: float, decay: float) -> list[tuple[float, float]]:
        """The next smaller and larger learning rate and weight decay, one of them changed at a time."""
        rates, decays = self._ladders
        i, j = rates.index(lr), decays.index(decay)
        near = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
        return [(rates[m], decays[n]) for m, n in near if 0 <= m < len(rates) and 0 <= n < len(decays)]

    def __str__(self) -> str:
        return f"{self.dataset} {self.arch}"


@dataclass(frozen=True)
class Preset:
    """The tasks of one size."""

    tasks: tuple[Task, ...]
    seeds: int
    """Fresh seeds on the test set."""
    rungs: tuple[int, ...] = ()
    """Of the search for a default: the epochs of each."""
    compiled: bool = True
    """Whether the networks train under ``torch.compile``."""


def _medium(dataset: str, arch: str) -> Task:
    # 120 epochs is where the paper's Table I is read
    grid = (0.1, 0.3, 0.6), (1e-4, 2e-4, 5e-4)
    return Task(dataset, arch, 32, 120, 256, *grid, wider=((0.03, 1.2), (5e-5, 1e-3)))


def _paper(dataset: str, arch: str) -> Task:
    # [HBNN] section V: SGD 0.1, cosine; the mean of the last epochs
    return Task(dataset, arch, 32, 600, 256, (0.1,), (5e-4,), readout=10)


def _imagenet(arch: str) -> Task:
    return Task("imagenet", arch, 224, 250, 512, (0.1,), (1e-4,), readout=5)


PRESETS = {
    "smoke": Preset(
        (
            Task("cifar10", "resnet8", 16, 2, 32, (0.1, 0.3), (5e-4,), finalists=2, tuning_seeds=2, limit=160),
            Task("imagenet", "resnet18_imagenet", 32, 2, 4, (0.1,), (1e-4,), readout=2),
        ),
        seeds=2,
        rungs=(1, 2),
        compiled=False,
    ),
    "small": Preset(
        (
            Task(
                "cifar10",
                "resnet8",
                16,
                40,
                128,
                (0.1, 0.3, 0.6),
                (1e-4, 2e-4, 5e-4),
                wider=((0.03, 1.2), (5e-5, 1e-3)),
            ),
        ),
        seeds=5,
        rungs=(10, 20, 40),
    ),
    "medium": Preset(
        (
            _medium("cifar10", "resnet20"),
            _medium("cifar10", "resnet18"),
            _medium("cifar10", "vgg_small"),
            _medium("cifar100", "resnet18"),
        ),
        seeds=5,
        rungs=(30, 60, 120),
    ),
    "paper": Preset(
        (
            _paper("cifar10", "resnet18"),
            _paper("cifar10", "vgg_small"),
            _paper("cifar100", "resnet18"),
            _paper("cifar100", "vgg_small"),
            _imagenet("resnet18_imagenet"),
            _imagenet("resnet34_imagenet"),
        ),
        seeds=5,
    ),
}
