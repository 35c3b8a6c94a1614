"""Images in files, one folder a class, as ImageNet usually lies: ``train/n01440764/x.JPEG``, ``val/n01440764/y.JPEG``.

Training takes a random part of each image, 8 % to 100 % of its area at 3 : 4 to 4 : 3, and mirrors every second one;
evaluation takes the centre, 224 pixels of a shorter side of 256. DataLoader's worker processes read them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distributed import ALONE, CPU
from images import count_kept, count_steps, normalise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.context import BaseContext
    from pathlib import Path

    import numpy.typing as npt

    from distributed import World

__all__ = ["ImageFolder", "checksum", "load"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
LAYOUT = "It must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG."


@dataclass(frozen=True)
class ImageFolder:
    """Images in the files of a folder.

    Attributes:
        folder: what ``names`` are relative to.
        names: file names as bytes: an array shares a million of them with the workers, a list would be copied.
        classes: int64 of shape (N,), on the CPU.
        size: what height and width become.
        augmented: for training, crop and mirror at random.
        workers: processes that read; 0 reads in this one.
        device: of batches and labels.
    """

    folder: Path
    names: npt.NDArray[np.bytes_]
    classes: Tensor
    size: int = 224
    augmented: bool = False
    workers: int = 0
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def labels(self) -> Tensor:
        return self.classes.to(self.device)

    def to(self, device: torch.device) -> ImageFolder:
        return replace(self, device=device)

    def split(self, share: float) -> tuple[ImageFolder, ImageFolder]:
        """Hold out images chosen at random (files come class by class), always the same ones."""
        order, kept = _shuffled(len(self)), count_kept(len(self), share)
        return self.pick(order[:kept]), replace(self.pick(order[kept:]), augmented=False)

    def pick(self, indices: Tensor) -> ImageFolder:
        """Some of the images, in the order that they have here."""
        indices = indices.sort().values
        return replace(self, names=self.names[indices.numpy()], classes=self.classes[indices])

    def batches(self, size: int, world: World = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        starts = range(0, len(self) - world.rank, size)
        return self._read(torch.arange(len(self)), [world.share(i, i + size) for i in starts], None)

    def steps(self, size: int, world: World = ALONE) -> int:
        """See `count_steps`."""
        return count_steps(len(self), size, world)

    def epoch(
        self, seed: int, epoch: int, size: int, start: int = 0, world: World = ALONE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The augmented batches of a training epoch from batch ``start`` on.

        Each image has random numbers of its own, of (seed, epoch, its index), whichever worker reads it when.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed((seed << 20) + epoch))
        shares = [world.share(i * size, (i + 1) * size) for i in range(start, self.steps(size, world))]
        return self._read(order, shares, f"{seed} {epoch}" if self.augmented else None)

    def _read(self, order: Tensor, shares: list[slice], draw: str | None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Reader(self, draw),
            batch_sampler=[order[share].tolist() for share in shares],
            num_workers=self.workers,
            multiprocessing_context=_clean_processes() if self.workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for pixels, labels in loader:
            moved = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield normalise(moved, MEAN, STD), labels.to(self.device, non_blocking=True)


def load(
    data: Path, size: int = 224, limit: int | None = None, workers: int | None = None
) -> tuple[ImageFolder, ImageFolder]:
    """The training set (augmented) and the evaluation set.

    Args:
        data: the folder that contains ``train`` and ``val``.
        size: height and width that images are brought to.
        limit: keep so many training images, and at most as many for evaluation, chosen at random but always the same.
        workers: processes that read, 0 to read in this one; by default one a core, shared with the ranks beside it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one image is needed.")
    classes, others = _classes(data / "train"), _classes(data / "val")
    if classes != others:
        name = min(set(classes) ^ set(others))
        missing = data / ("val" if name in classes else "train")
        raise ValueError(
            f"train has {len(classes)} classes and val has {len(others)}: {missing} has no folder {name}. {LAYOUT}"
        )
    workers = _free_cores() if workers is None else workers
    train, val = (_scan(data / part, classes, size, workers) for part in ("train", "val"))
    if limit is not None:
        train, val = (images.pick(_shuffled(len(images))[:limit]) for images in (train, val))
    return replace(train, augmented=True), val


def checksum(data: Path) -> str:
    """CRC-32 of the evaluation images' names and sizes, in hexadecimal digits."""
    files = sorted((data / "val").glob("*/*"))
    listing = "".join(f"{file.relative_to(data)} {file.stat().st_size}\n" for file in files)
    return format(zlib.crc32(listing.encode()), "08x")


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. {LAYOUT}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"{folder} holds no class folders. {LAYOUT}")
    return classes


def _scan(folder: Path, classes: list[str], size: int, workers: int) -> ImageFolder:
    names: list[bytes] = []
    counts = []
    for name in classes:
        files = sorted(f for f in os.listdir(folder / name) if os.path.splitext(f)[1].lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{folder / name} holds no images ({', '.join(sorted(SUFFIXES))}).")
        names += [os.fsencode(os.path.join(name, file)) for file in files]
        counts.append(len(files))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return ImageFolder(folder, np.array(names), labels, size, workers=workers)


@cache
def _clean_processes() -> BaseContext:
    """Where readers start: a fork of this process may copy a lock that another of its threads holds just then, and wait
    for it forever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "PIL.Image"])
    return context


def _free_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Reader(Dataset[tuple[Tensor, int]]):
    """Image and label by index, for DataLoader; ``draw`` names what the random numbers depend on."""

    images: ImageFolder
    draw: str | None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.images.folder / os.fsdecode(self.images.names[index])
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except Exception as error:
            raise ValueError(f"{path} is not a readable image ({error}). Restore it or take it away.") from error
        if self.draw is None:
            image = _centre(image, self.images.size)
        else:
            image = _random_part(image, self.images.size, random.Random(f"{self.draw} {index}"))
        return torch.from_numpy(np.array(image)), int(self.images.classes[index])


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The middle of the image, 7/8 of its shorter side."""
    scale = round(size * 256 / 224) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _random_part(image: Image.Image, size: int, draw: random.Random) -> Image.Image:
    left, top, width, height = _random_box(*image.size, draw)
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def _random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part; in ten tries none may fit, then as much of the centre as does."""
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h
