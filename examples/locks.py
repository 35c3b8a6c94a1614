"""Files that one process at a time may work on."""

from __future__ import annotations

import contextlib
from typing import IO, TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows: there it is up to the user
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["lock", "occupied"]


def lock(file: IO[bytes], wait: bool = True) -> None:
    """Hold the open file until it is closed. Raises BlockingIOError where another process does, unless we ``wait``."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Inside, the folder is ours. Raises ValueError where another process has it; a killed one has it no longer."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in-use.lock").open("ab") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {folder}: wait for it, or give --runs a folder of your own"
            ) from None
        yield
