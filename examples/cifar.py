"""CIFAR-10 and CIFAR-100 in their official binary layouts, read without pickle.

``cifar-10-batches-bin`` holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, each of 10,000
records: one byte of label, then 32 × 32 bytes of red, of green, of blue. ``cifar-100-binary`` holds ``train.bin`` of
50,000 records and ``test.bin`` of 10,000, with two bytes of label: the coarse class, and the fine one, which is used.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from images import Images

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["checksum", "load"]

PIXEL_BYTES = 3 * 32 * 32
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)


@dataclass(frozen=True)
class _Layout:
    """How one of the two lies on disk."""

    name: str
    folder: str
    archive: str
    train: Mapping[str, int]
    """File → records in it."""
    test: Mapping[str, int]
    labels: Mapping[str, int]
    """The label bytes that a record begins with, and how many classes each of them knows; the last one is used."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def record_bytes(self) -> int:
        return len(self.labels) + PIXEL_BYTES

    @property
    def mend(self) -> str:
        return (
            f"Get the binary version ({self.archive}) from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it."
        )


LAYOUTS = {
    10: _Layout(
        name="CIFAR-10",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train=dict.fromkeys(TRAIN_FILES, 10_000),
        test=dict.fromkeys(TEST_FILES, 10_000),
        labels={"label": 10},
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    100: _Layout(
        name="CIFAR-100",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train={"train.bin": 50_000},
        test={"test.bin": 10_000},
        labels={"coarse label": 20, "fine label": 100},
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}
"""By number of classes."""


def load(data: Path, size: int = 32, limit: int | None = None, classes: int = 10) -> tuple[Images, Images]:
    """The training set (augmented) and the test set.

    Args:
        data: the folder ``cifar-10-batches-bin`` or ``cifar-100-binary``, or the one that contains it.
        size: 32, or 16 for images averaged over 2 × 2 pixels.
        limit: keep the first so many training images, and at most as many test images.
        classes: 10 for CIFAR-10, 100 for CIFAR-100.
    """
    if size not in (16, 32):
        raise ValueError(f"size is {size}; CIFAR images come at 32 or, averaged over 2 x 2 pixels, at 16.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one image is needed.")
    if classes not in LAYOUTS:
        raise ValueError(f"classes is {classes}; CIFAR comes with 10 or with 100.")
    layout = LAYOUTS[classes]
    folder = _find(data, layout)
    train, test = (_read_split(folder, layout, files, size, limit) for files in (layout.train, layout.test))
    # A crop may shift by an eighth of the image: the usual 4 pixels of 32.
    return Images(*train, layout.mean, layout.std, shift=size // 8, flip=True), Images(*test, layout.mean, layout.std)


def checksum(data: Path, classes: int = 10) -> str:
    """CRC-32 of the test images' file, in hexadecimal digits: another for a copy that was compressed on its way."""
    layout = LAYOUTS[classes]
    folder = _find(data, layout)
    return format(zlib.crc32(b"".join((folder / name).read_bytes() for name in layout.test)), "08x")


def _find(data: Path, layout: _Layout) -> Path:
    for folder in (data, data / layout.folder):
        if any((folder / name).is_file() for name in (*layout.train, *layout.test)):
            return folder
    raise FileNotFoundError(
        f"No {layout.name} files such as {next(iter(layout.train))} in {data} or in {data / layout.folder}. "
        f"{layout.mend}"
    )


def _read_split(
    folder: Path, layout: _Layout, files: Mapping[str, int], size: int, limit: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = sum(files.values()) if limit is None else limit
    parts = []
    for name, count in files.items():
        parts.append(_read_file(folder / name, layout, count, min(count, wanted)))
        wanted -= len(parts[-1])
    records = torch.from_numpy(np.concatenate(parts))
    pixels = records[:, len(layout.labels) :].view(-1, 3, 32, 32)
    if size == 16:
        pixels = F.avg_pool2d(pixels.float(), 2).round_().to(torch.uint8)
    return pixels, records[:, len(layout.labels) - 1].long()


def _read_file(
    path: Path, layout: _Layout, records: int, count: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The first ``count`` records of a file, whose length is checked as a whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, other {layout.name} files are there. {layout.mend}")
    length, expected = path.stat().st_size, records * layout.record_bytes
    if length != expected:
        problem = "truncated" if length < expected else "too long"
        raise ValueError(f"{path} is {problem}: {length} bytes instead of {expected}. {layout.mend}")
    read = np.fromfile(path, dtype=np.uint8, count=count * layout.record_bytes).reshape(count, layout.record_bytes)
    for i, (name, classes) in enumerate(layout.labels.items()):
        wrong = np.flatnonzero(read[:, i] >= classes)
        if wrong.size:
            value = read[wrong[0], i]
            raise ValueError(
                f"{path} is damaged: record {wrong[0]} has {name} {value}, and {name}s end at {classes - 1}. "
                f"{layout.mend}"
            )
    return read
