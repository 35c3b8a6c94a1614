"""CIFAR-10 in its official binary layout, read without pickle.

``cifar-10-batches-bin`` holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, each of 10000
records: one byte of label, then 32 × 32 bytes of red, of green, of blue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from images import Images

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["load"]

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORDS = 10_000
RECORD_BYTES = 1 + 3 * 32 * 32
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
MEND = "Get the binary version (cifar-10-binary.tar.gz) from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it."


def load(data: Path, size: int = 32, limit: int | None = None) -> tuple[Images, Images]:
    """The training set (augmented) and the test set.

    Args:
        data: the folder ``cifar-10-batches-bin``, or the one that contains it.
        size: 32, or 16 for images averaged over 2 × 2 pixels.
        limit: keep the first so many training images, and at most as many test images.
    """
    if size not in (16, 32):
        raise ValueError(f"size is {size}; CIFAR images come at 32 or, averaged over 2 x 2 pixels, at 16.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one image is needed.")
    folder = _find(data)
    train, test = (_read_split(folder, names, size, limit) for names in (TRAIN_FILES, TEST_FILES))
    # A crop may shift by an eighth of the image: the usual 4 pixels of 32.
    return Images(*train, MEAN, STD, shift=size // 8, flip=True), Images(*test, MEAN, STD)


def _find(data: Path) -> Path:
    for folder in (data, data / FOLDER):
        if any((folder / name).is_file() for name in TRAIN_FILES + TEST_FILES):
            return folder
    raise FileNotFoundError(f"No CIFAR-10 files such as {TRAIN_FILES[0]} in {data} or in {data / FOLDER}. {MEND}")


def _read_split(
    folder: Path, names: tuple[str, ...], size: int, limit: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = min(limit or RECORDS * len(names), RECORDS * len(names))
    parts = []
    for i, name in enumerate(names):
        parts.append(_read_file(folder / name, max(0, min(RECORDS, wanted - i * RECORDS))))
    records = torch.from_numpy(np.concatenate(parts))
    pixels = records[:, 1:].view(-1, 3, 32, 32)
    if size == 16:
        pixels = F.avg_pool2d(pixels.float(), 2).round_().to(torch.uint8)
    return pixels, records[:, 0].long()


def _read_file(path: Path, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The first ``count`` records of a file, whose length is checked as a whole."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, other CIFAR-10 files are there. {MEND}")
    length, expected = path.stat().st_size, RECORDS * RECORD_BYTES
    if length != expected:
        problem = "truncated" if length < expected else "too long"
        raise ValueError(f"{path} is {problem}: {length} bytes instead of {expected}. {MEND}")
    records = np.fromfile(path, dtype=np.uint8, count=count * RECORD_BYTES).reshape(count, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if wrong.size:
        label = records[wrong[0], 0]
        raise ValueError(f"{path} is damaged: record {wrong[0]} has label {label}, and labels end at 9. {MEND}")
    return records
