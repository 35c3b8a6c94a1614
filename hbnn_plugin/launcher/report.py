"""What a training run leaves: flips and clusters as tables and a picture, and fused copies of its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diagnostics.clusters import cluster_report
from ..diagnostics.flips import FlipRatio, flip_ratio
from ..export.files import beside
from ..retrofit.checkpoint import holds_clusters, plain_state_dict

__all__ = ["check_report", "write_report"]


def check_report(folder: Path) -> None:
    """Raise, before a long training, what would keep its report from being written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the report's folder {folder} is not writable")


def write_report(folder: Path, models: Sequence[nn.Module], saved: Sequence[Path] = ()) -> list[Path]:
    """Write ``flips.txt``, ``flips.json``, ``flips.png`` (where matplotlib is installed) and ``fused/``.

    Args:
        folder: is made if it is missing; each file in it appears whole or not at all.
        models: applied models; of several, files are numbered.
        saved: checkpoint files; those that hold an applied model's state_dict, at any depth, are copied with plain
            weights. They are read with ``weights_only=True``.

    Returns:
        The files that could not be read so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, model in enumerate(models):
        name = "flips" if len(models) == 1 else f"flips-{i + 1}"
        flips, clusters = flip_ratio(model), cluster_report(model)
        _write_text(folder / f"{name}.txt", f"{flips}\n\n{clusters}\n")
        layers = {key: {"flip_ratio": flips[key], **clusters[key]._asdict()} for key in flips}
        _write_text(folder / f"{name}.json", json.dumps({"total": flips.total, "layers": layers}, indent=2) + "\n")
        _draw(folder / f"{name}.png", flips)
    unread = []
    top = Path(os.path.commonpath([path.parent for path in saved])) if saved else folder
    for path in saved:
        try:
            plain = _plain(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception:  # a damaged file makes torch.load raise nearly anything
            unread.append(path)
            continue
        if plain is not None:
            target = folder / "fused" / path.relative_to(top)
            target.parent.mkdir(parents=True, exist_ok=True)
            with beside(target) as temporary:
                torch.save(plain, temporary)
    return unread


def _plain(content: Any) -> Any:
    """The content with every applied model's state_dict made plain; None if there is none."""
    if isinstance(content, (list, tuple)):
        entries = [_plain(value) for value in content]
        if not any(entries):
            return None
        filled = [value if plain is None else plain for value, plain in zip(content, entries)]
        return tuple(filled) if isinstance(content, tuple) else filled
    if not isinstance(content, Mapping):
        return None
    if holds_clusters(content):
        return plain_state_dict(content)
    changed = {key: plain for key, value in content.items() if (plain := _plain(value)) is not None}
    return {**content, **changed} if changed else None


def _draw(path: Path, flips: FlipRatio) -> None:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        return
    figure = Figure(figsize=(max(4, 0.35 * len(flips) + 2), 3.5), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(flips)), [100 * ratio for ratio in flips.values()])
    axis.axhline(50, color="0.6", linewidth=1)
    axis.set_xticks(range(len(flips)), list(flips), rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="binary weights flipped since the reference, %", title=f"all layers: {100 * flips.total:.1f} %")
    with beside(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _write_text(path: Path, text: str) -> None:
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
