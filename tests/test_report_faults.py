"""A report that is killed at any file operation leaves whole files only, and damaged checkpoints do not stop it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hbnn_plugin.launcher.report import write_report
from tiny_hosts import tiny_net
from training_helpers import Trap, applied, saved, trained

pytest.importorskip("matplotlib.backends.backend_agg")  # here, since each child would need a second for it

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")

NAMES = ["flips.json", "flips.png", "flips.txt", "fused/best.pt", "fused/last.pt"]


def killed_at(operation: int, folder: Path, *arguments: Any) -> bool:
    """Write the report in a child that is killed before its nth file operation in the folder; whether it had one."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, details: tuple[Any, ...]) -> None:
            nonlocal left
            opened_to_read = event == "open" and details[1] in ("r", "rb", None)
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and not opened_to_read:
                place = os.fspath(details[0]) if isinstance(details[0], (str, os.PathLike)) else ""
                if place.startswith(os.fspath(folder)):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            write_report(folder, *arguments)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status == signal.SIGKILL


def shown(folder: Path) -> list[str]:
    """The files that a user sees."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_report_killed_at_any_file_operation_holds_whole_files_and_is_made_whole_by_the_next(tmp_path: Path) -> None:
    net = trained()
    checkpoints = tmp_path / "run"
    checkpoints.mkdir()
    paths = [checkpoints / "best.pt", checkpoints / "last.pt"]
    for path in paths:
        torch.save({"model": net.state_dict(), "epoch": 3}, path)
    whole = tmp_path / "whole"
    assert write_report(whole, [net], paths) == []
    assert shown(whole) == NAMES
    expected = {name: (whole / name).read_bytes() for name in NAMES if not name.endswith(".pt")}
    kills, sets = 0, set()
    while killed_at(kills, folder := tmp_path / f"killed-{kills}", [net], paths):
        found = shown(folder) if folder.exists() else []
        sets.add(tuple(found))
        for name in found:
            if name in expected:
                assert (folder / name).read_bytes() == expected[name], f"{name} is torn after {kills} operations"
            else:
                tiny_net().load_state_dict(torch.load(folder / name, weights_only=True)["model"])
        kills += 1
        if kills % 6 == 1:
            assert write_report(folder, [net], paths) == []
            assert shown(folder) == NAMES
            assert json.loads((folder / "flips.json").read_text())["total"] > 0
    assert kills >= 2 * len(NAMES), "each file is opened and put into its place"
    assert sets >= {(), ("flips.txt",), tuple(NAMES[:4])}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_told_and_the_others_are_fused(share: float, tmp_path: Path) -> None:
    net = applied()
    paths = [tmp_path / "run" / "best.pt", tmp_path / "run" / "last.pt"]
    paths[0].parent.mkdir()
    for path in paths:
        torch.save(net.state_dict(), path)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: int(share * len(content))])
    assert write_report(tmp_path / "report", [net], paths) == [paths[0]]
    assert shown(tmp_path / "report") == [name for name in NAMES if not name.endswith("best.pt")]


def test_files_of_torchs_old_format_cut_off_anywhere_are_told(tmp_path: Path) -> None:
    """From which torch.load raises IndexError, struct.error and more."""
    net = applied()
    good, folder = tmp_path / "run" / "good.pt", tmp_path / "run"
    folder.mkdir()
    torch.save(net.state_dict(), good, _use_new_zipfile_serialization=False)
    content = good.read_bytes()
    cut = [folder / f"{size}.pt" for size in range(0, len(content), 37)]
    for path in cut:
        path.write_bytes(content[: int(path.stem)])
    assert write_report(tmp_path / "report", [net], [*cut, good]) == cut
    assert shown(tmp_path / "report") == [*NAMES[:3], "fused/good.pt"]


def test_every_state_dict_in_a_checkpoint_is_made_plain_wherever_it_is(tmp_path: Path) -> None:
    net = applied()
    torch.save({"models": (net.state_dict(), {"ema": net.state_dict()}, 3), "epoch": 1}, tmp_path / "last.pt")
    assert write_report(tmp_path / "report", [net], [tmp_path / "last.pt"]) == []
    models = torch.load(tmp_path / "report" / "fused" / "last.pt", weights_only=True)["models"]
    assert isinstance(models, tuple)
    first, second, number = models
    assert number == 3
    for state in (first, second["ema"]):
        tiny_net().load_state_dict(state)


def test_a_hostile_checkpoint_runs_no_code(tmp_path: Path) -> None:
    net = applied()
    path = tmp_path / "last.pt"
    torch.save({**net.state_dict(), "more": Trap(tmp_path)}, path)
    assert write_report(tmp_path / "report", [net], [path]) == [path]
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_with_damaged_settings_is_told(tmp_path: Path) -> None:
    net = applied()
    checkpoint: dict[str, Any] = saved(net.state_dict())
    key = next(key for key in checkpoint if key.endswith("_extra_state"))
    checkpoint[key] = checkpoint[key][:5]
    path = tmp_path / "last.pt"
    torch.save(checkpoint, path)
    assert write_report(tmp_path / "report", [net], [path]) == [path]
