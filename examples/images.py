"""A set of images in memory, and its epochs as batches that depend on (seed, epoch) alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Images"]


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

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        for start in range(0, len(self), size):
            yield self._normalise(self.pixels[start : start + size]), self.labels[start : start + size]

    def steps(self, size: int) -> int:
        """Batches in a training epoch; a last one of a single image is left out, BatchNorm has no use for it."""
        whole, rest = divmod(len(self), size)
        return whole + (rest > 1)

    def epoch(self, seed: int, epoch: int, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of a training epoch from batch ``start`` on.

        Everything random is drawn up front from a generator seeded by (seed, epoch), always on the CPU: a resumed epoch
        continues with exactly the batches that an uninterrupted one would have seen, on any device.
        """
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        count, device = len(self), self.pixels.device
        order = torch.randperm(count, generator=generator).to(device)
        offsets = torch.randint(2 * self.shift + 1, (2, count), generator=generator).to(device)
        mirrored = torch.rand(count, generator=generator).to(device) < 0.5
        for step in range(start, self.steps(size)):
            part = slice(step * size, (step + 1) * size)
            picked = order[part]
            pixels = self.pixels[picked]
            if self.shift or self.flip:
                pixels = self._augment(pixels, offsets[:, part], mirrored[part])
            yield self._normalise(pixels), self.labels[picked]

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

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return pixels.float().div_(255).sub_(mean).div_(std)
