"""Checkpoints that survive a kill at any moment: written beside, then moved into place."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_same", "load", "save", "write_text"]


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain Python values in one atomic step."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        # Without this a power cut could leave the new name with no content.
        os.fsync(file.fileno())
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one atomic step."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read back what `save` wrote, onto the CPU; tensors and plain values only, no code is run."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}). Delete it to start over.") from error
    return content


def check_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise unless a checkpoint belongs to the same configuration; name every key that differs."""
    keys = sorted(key for key in {*saved, *now} if saved.get(key) != now.get(key))
    if keys:
        differences = ", ".join(f"{key} {json.dumps(saved.get(key))} -> {json.dumps(now.get(key))}" for key in keys)
        raise ValueError(
            f"{path} was trained with other settings: {differences}. "
            "Repeat the old ones to continue it, choose another --out, or start over with --fresh."
        )
