"""What training asks of a set of images, and such a set in memory.

The batches of a training epoch depend on (seed, epoch) alone. Processes that train together (``world``) each get their
share of every batch, so that together they see what one process alone would see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed import ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import World

__all__ = ["ImageSet", "Images", "count_kept", "count_steps", "normalise"]


class ImageSet(Protocol):
    """Images and their classes, wherever they lie."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """Of all images in order, on the device of the batches."""

    def to(self, device: torch.device) -> ImageSet:
        """The same images with their batches on ``device``."""

    def split(self, share: float) -> tuple[ImageSet, ImageSet]:
        """Hold out a share of the images: the others, and these without augmentation."""

    def batches(self, size: int, world: World = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are, in batches of ``size`` over all ranks."""

    def steps(self, size: int, world: World = ALONE) -> int:
        """Batches in a training epoch."""

    def epoch(
        self, seed: int, epoch: int, size: int, start: int = 0, world: World = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of a training epoch, of ``size`` over all ranks, from batch ``start`` on."""


@dataclass(frozen=True)
class Images:
    """Images as bytes, with what it takes to feed them to a network.

    Attributes:
        pixels: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, likewise.
        shift: for training, crop at random after padding every side with so many black pixels.
        flip: for training, mirror every second image, at random.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def split(self, share: float) -> tuple[Images, Images]:
        """Hold out the last images, as they are."""
        kept = count_kept(len(self), share)
        held_out = replace(self, pixels=self.pixels[kept:], labels=self.labels[kept:], shift=0, flip=False)
        return replace(self, pixels=self.pixels[:kept], labels=self.labels[:kept]), held_out

    def batches(self, size: int, world: World = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        for start in range(0, len(self) - world.rank, size):
            part = world.share(start, start + size)
            yield normalise(self.pixels[part], self.mean, self.std), self.labels[part]

    def steps(self, size: int, world: World = ALONE) -> int:
        """See `count_steps`."""
        return count_steps(len(self), size, world)

    def epoch(
        self, seed: int, epoch: int, size: int, start: int = 0, world: World = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of a training epoch from batch ``start`` on.

        Everything random is drawn up front from a generator seeded by (seed, epoch), always on the CPU: a resumed epoch
        continues with exactly the batches that an uninterrupted one would have seen, on any device.
        """
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        count, device = len(self), self.pixels.device
        order = torch.randperm(count, generator=generator).to(device)
        offsets = torch.randint(2 * self.shift + 1, (2, count), generator=generator).to(device)
        mirrored = torch.rand(count, generator=generator).to(device) < 0.5
        for step in range(start, self.steps(size, world)):
            part = world.share(step * size, (step + 1) * size)
            picked = order[part]
            pixels = self.pixels[picked]
            if self.shift or self.flip:
                pixels = self._augment(pixels, offsets[:, part], mirrored[part])
            yield normalise(pixels, self.mean, self.std), self.labels[picked]

    def _augment(self, pixels: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        rows = torch.arange(height, device=pixels.device).expand(count, height)
        columns = torch.arange(width, device=pixels.device).expand(count, width)
        if self.flip:
            columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
        rows, columns = rows + offsets[0, :, None], columns + offsets[1, :, None]
        padded = F.pad(pixels, (self.shift,) * 4)
        image = torch.arange(count, device=pixels.device)[:, None, None]
        # Indexing around the channels puts them last: (N, H, W, C).
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Bytes of shape (N, C, H, W) as floats, scaled to [0, 1] and standardised by channel."""
    return pixels.float().div_(255).sub_(_by_channel(mean, pixels.device)).div_(_by_channel(std, pixels.device))


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)  # once: a GPU would wait for each copy


def count_kept(count: int, share: float) -> int:
    """How many of the images remain when a share is held out."""
    kept = round(count * (1 - share))
    if not 0 < kept < count:
        raise ValueError(f"Holding out a share of {share} of {count} images leaves {kept}; neither part may be empty.")
    return kept


def count_steps(count: int, size: int, world: World) -> int:
    """Batches in a training epoch.

    A last one that leaves a rank with less than two images is left out: BatchNorm has no use for a single one.
    """
    if size < world.size:
        raise ValueError(f"A batch of {size} images is too small for {world.size} processes.")
    whole, rest = divmod(count, size)
    return whole + (rest // world.size > 1)
