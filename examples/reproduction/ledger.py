"""The file of finished runs: one JSON line each, added and never changed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from locks import lock

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["append", "read"]


def read(path: Path) -> list[dict[str, Any]]:
    """All lines. A last line that a kill left unfinished is left out; damage anywhere else is an error."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}). Delete that line; its run repeats."
            ) from None
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line, alone at the file meanwhile. A last line that a kill left unfinished goes: its run repeats.

    (One that lacks the line break alone, such as from an editor, stays.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, separators=(",", ":")) + "\n"
    with path.open("a+b", buffering=0) as file:
        lock(file)
        file.seek(0)
        *_, last = file.read().split(b"\n")
        if last and _is_json(last):
            text = f"\n{text}"
        else:
            file.truncate(file.tell() - len(last))
        file.write(text.encode())
        os.fsync(file.fileno())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
