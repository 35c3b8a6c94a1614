"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["beside"]


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; if nothing goes wrong meanwhile, that file takes its place in the end."""
    path = Path(os.path.realpath(path))  # what a symbolic link points to
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
