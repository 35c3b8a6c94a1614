"""Settings and data for all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

import cifar

# The tensors are tiny: a second thread gains nothing, and on a busy machine it waits for the first.
torch.set_num_threads(1)

# How long an example takes tells of the machine, and of what torch does at its first call.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_finish() -> None:
    """Neither garbage collections nor ``apply``, looking for who holds a weight, need go through what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws depends on no other test, whichever process it runs in."""
    torch.manual_seed(0)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """One process that calls itself a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's official layout: 10,000 records a file, the first 200 are noise and the rest a sparse zero."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*cifar.TRAIN_FILES, *cifar.TEST_FILES]:
        records = generator.integers(0, 256, (200, cifar.LAYOUTS[10].record_bytes), dtype=np.uint8)
        records[:, 0] %= 10
        with (folder / name).open("wb") as file:
            file.write(records.tobytes())
            file.truncate(10_000 * cifar.LAYOUTS[10].record_bytes)
    return folder.parent
