"""``python -m hbnn_plugin train.py``: unedited scripts, from the outside."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hbnn_plugin
from hbnn_plugin.launcher import command
from hbnn_plugin.launcher.command import main
from two_ranks import torchrun

SCRIPT = """
import argparse
import sys
import time

import torch
import torch.nn.functional as F
from {imported} import BinaryConv
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2)
parser.add_argument("--end", default="well")
args = parser.parse_args()  # at import


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BinaryConv(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    {wrap}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(args.steps):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(8, 3, 6, 6)), torch.arange(8) % 2).backward()
        optimizer.step()
        print("step", step, flush=True)
    torch.save({{"state_dict": net.state_dict(), "epoch": 1}}, "last{rank}.pth")
    if args.end == "exit":
        sys.exit(3)
    while args.end == "never":
        time.sleep(0.05)


if __name__ == "__main__":
    main()
"""

CONV = """
import torch.nn.functional as F
from torch import nn


class BinaryConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, (self.weight.sign() - self.weight).detach() + self.weight, self.bias)
"""

DDP = (
    "torch.distributed.init_process_group('gloo'); net = nn.parallel.DistributedDataParallel(net); "
    "import os; rank = os.environ['RANK']"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A script beside its helper, the same two as a package, and the script for two processes."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    for place in (tmp_path, tmp_path / "package"):
        (place / "convs.py").write_text(CONV)
    (tmp_path / "train.py").write_text(SCRIPT.format(imported="convs", wrap="", rank=""))
    (tmp_path / "package" / "train.py").write_text(SCRIPT.format(imported=".convs", wrap="", rank=""))
    parallel = SCRIPT.format(imported="convs", wrap=DDP, rank="-RANK")
    # the barrier: see World.close in examples/distributed.py
    parallel = parallel.replace('"last-RANK.pth")', 'f"last{rank}.pth")\n    torch.distributed.barrier()')
    (tmp_path / "parallel.py").write_text(parallel.replace('torch.save({"', 'rank == "0" and torch.save({"'))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hbnn_plugin", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_script_its_exit_status_its_output_and_a_report(folder: Path) -> None:
    done = run(folder, "--radius", "0.1", "--report", "report", "train.py", "--steps", "3", "--end", "exit")
    assert done.returncode == 3, done.stderr
    assert done.stdout == "step 0\nstep 1\nstep 2\n"
    assert "radius=0.1" in done.stderr
    flips = json.loads((folder / "report" / "flips.json").read_text())
    assert list(flips["layers"]) == ["1"]
    assert flips["layers"]["1"]["steps"] == 3
    assert "1.weight_epc.point" in torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    assert (folder / "report" / "flips.png").read_bytes().startswith(b"\x89PNG")
    fused = torch.load(folder / "report" / "fused" / "last.pth", weights_only=True)
    assert "1.weight" in fused["state_dict"]
    assert not any("_epc" in key for key in fused["state_dict"])
    assert fused["epoch"] == 1
    assert not [path for path in (folder / "report").rglob("*") if path.name.startswith(".")]


def test_a_module_with_relative_imports(folder: Path) -> None:
    done = run(folder, "--mode", "parametrize", "-m", "package.train", "--steps", "1")
    assert (done.returncode, done.stdout) == (0, "step 0\n"), done.stderr
    assert "1.parametrizations.weight.0.point" in torch.load(folder / "last.pth", weights_only=True)["state_dict"]


def test_an_interrupt_is_the_scripts_own_and_the_report_is_written(folder: Path) -> None:
    command = [sys.executable, "-m", "hbnn_plugin", "--report", "report", "train.py", "--end", "never"]
    # A shell's background jobs ignore interrupts, and their children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,  # noqa: PLW1509
    ) as process:
        deadline = time.monotonic() + 240
        while not (folder / "last.pth").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors
    assert process.returncode == 130
    assert (folder / "report" / "flips.txt").exists()


def test_torchrun_wraps_the_model_before_the_optimizer(folder: Path) -> None:
    done = torchrun("-m", "hbnn_plugin", "--report", "report", "parallel.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hbnn_plugin: EPC on 1 layer(s)") == 1  # rank 0 speaks
    assert (folder / "report" / "flips.txt").exists()
    assert "module.1.weight" in torch.load(folder / "report" / "fused" / "last0.pth", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the script"),
        (["--radius", "0.1"], "name the script"),
        (["missing.py"], "no script missing.py"),
        (["--radius", "large", "train.py"], "invalid float value"),
        (["--nonsense", "1", "train.py"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_are_one_message_before_anything_runs(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "last.pth").exists()


def test_a_script_without_a_binary_network_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "plain.py").write_text("import torch\ntorch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["plain.py"])
    assert "nothing was applied" in capsys.readouterr().err


def test_an_option_out_of_range_ends_it_before_the_script_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise AssertionError('it began')")
    with pytest.raises(SystemExit):
        main(["--radius", "-1", str(script)])
    assert "radius" in capsys.readouterr().err


def test_a_report_stays_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "train.py"
    lines = ["import os", "from tiny_hosts import *", "os.chdir('elsewhere')", "net = tiny_net()"]
    lines += ["train(net, torch.optim.SGD(net.parameters(), lr=0.1), 1)"]
    script.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    main(["--report", "flips", str(script)])
    assert (tmp_path / "flips" / "flips.txt").is_file()


def test_processes_out_of_reach_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import torch.multiprocessing as mp\nmp.spawn(print, nprocs=0)")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    main([str(script)])
    said = capsys.readouterr().err
    assert "spawn starts processes that this launcher does not reach" in said and "nothing was applied" in said


def test_every_option_of_apply_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(Exception):
        """The script would run now."""

    seen: dict[str, Any] = {}

    def interception(options: dict[str, Any], *_: Any, **__: Any) -> None:
        seen.update(options)
        raise Taken

    monkeypatch.setattr(command, "Interception", interception)
    given = {"space": "ball", "radius": 0.1, "per": "layer", "binarize": "1/32", "mode": "parametrize", "start": 0.5}
    given |= {"rule": "mobius", "order": "alternating", "point_lr": 0.3, "point_lr_power": 0.6}
    given |= {"point_momentum": 0.8, "point_decay": 0.01}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(Taken):
        main([*options, "--relative", "--where", "conv[12]", "--where", "head", "-m", "train"])
    assert seen.keys() == inspect.signature(hbnn_plugin.apply).parameters.keys() - {"model"}
    where = seen.pop("where")
    assert [where(nn.Conv2d(1, 1, 1), name) for name in ("conv2", "conv3", "head")] == [True, False, True]
    assert seen == {**given, "relative": True}


@pytest.mark.parametrize("arguments", [["-m", "module", "--steps", "3"], ["-mmodule", "--steps", "3"]])
def test_a_module_is_named_as_for_python(arguments: list[str]) -> None:
    assert command._parse(["--radius", "0.1", *arguments])[2:] == (["module", "--steps", "3"], True)


def test_a_script_finds_what_lies_beside_it_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "train.py").write_text("import os, pathlib; os.chdir('inner'); print(pathlib.Path(__file__).exists())")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["train.py"])
    assert capsys.readouterr().out == "True\n"
