"""Where a figure comes from, for the line that holds it."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hbnn_plugin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["by_processor", "circumstances"]

RESULTS = "results"
"""Beside this file: to this folder runs add their lines, which is no change of the code."""


@cache
def circumstances(count: int, unit: str = "CPU thread") -> dict[str, str]:
    """Commit ("+": with uncommitted changes), machine and how much of it was used, versions; as at the first call."""
    commit = _git("describe", "--always") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "commit": commit + "+" * bool(changed),
        "machine": f"{device}, {count} {unit}{'s' * (count > 1)}",
        "torch": torch.__version__,
        "plugin": hbnn_plugin.__version__,
    }


def by_processor(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Lines by the processor or GPU that they were measured on, the latest one's last."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        processor = line["machine"].rsplit(", ", 1)[0]
        found[processor] = [*found.pop(processor, ()), line]
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
