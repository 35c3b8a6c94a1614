"""Run a training script as it is, with the cluster on its binary layers.

    python -m hbnn_plugin --radius 0.05 --report flips train.py --its-own --arguments
    python -m hbnn_plugin -m package.train --its-own --arguments
    torchrun --nproc-per-node 2 -m hbnn_plugin train.py --its-own --arguments

:func:`hbnn_plugin.apply` is called on the script's model when its first optimizer is built, or when DataParallel,
DistributedDataParallel or FSDP wraps it, or when it loads a checkpoint of an applied model, whichever comes first. Of
several models those are taken whose binary weights the optimizer trains: a teacher stays as it is. The mode is
``"inplace"`` unless ``--mode`` says otherwise: what the script does to its weights after each step cannot be seen
before it does it. What this module has to say goes to stderr; output, exit status and interrupts are the script's own.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ..cluster.settings import Mode, Order, Per, Rule, SpaceName, make_settings
from ..host.selection import by_name
from ..retrofit.apply import Binarize
from .interception import Interception
from .report import check_report, write_report

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Run the script that ``argv`` names; returns, or leaves, as the script does."""
    options, report, target, is_module = _parse(argv)
    if report is not None:
        report = report.absolute()  # the script may change the folder
        check_report(report)
    taken = Interception(options, _say, keep=report is not None)
    sys.argv = list(target)
    taken.start()
    try:
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(target[0]).resolve().parent))
            runpy.run_path(str(Path(target[0]).absolute()), run_name="__main__")
    finally:
        taken.stop()
        _finish(taken, report)


def _finish(taken: Interception, report: Path | None) -> None:
    """Never raises: the script's own end is what counts."""
    if not taken.applied:
        _say(
            "no optimizer was built on a binary convolution in this process, so nothing was applied in it; --where "
            "names layers"
        )
    elif report is not None and _is_first():
        try:
            unread = write_report(report, taken.models, taken.saved())
        except Exception as error:
            _say(f"the report is not complete: {error}")
            return
        _say(f"wrote {report}")
        for path in unread:
            _say(
                f"{path} could not be read as a file of tensors alone (weights_only=True), so it has no fused copy; if "
                "it is a checkpoint, hbnn_plugin.plain_state_dict makes the model's state_dict in it plain"
            )


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    if _is_first():
        print(f"hbnn_plugin: {message}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], Path | None, list[str], bool]:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # _split knows none
        prog="python -m hbnn_plugin",
        usage="python -m hbnn_plugin [options] (script.py | -m module) [its own arguments]",
        description="Run a training script as it is, with the cluster on its binary layers.",
    )
    add = parser.add_argument
    add("--space", choices=get_args(SpaceName), help="ball (HBNN) by default, or sphere (SBNN)")
    add("--radius", type=float, help="r; the ball ends at 1/√r. 0.05 by default, 1 for the sphere")
    add("--per", choices=get_args(Per), help="one point a filter by default, or one a layer")
    add("--where", action="append", metavar="REGEX", help="layers by name; may be repeated")
    add("--binarize", choices=get_args(Binarize), help="binarize a full-precision model first (weights/activations)")
    add("--mode", choices=get_args(Mode), default="inplace", help="inplace by default, which suits every trainer")
    add("--rule", choices=get_args(Rule), help="how points move: spectral by default, mobius on the sphere")
    add("--order", choices=get_args(Order), help="point and weight from one gradient by default, or the point first")
    add("--relative", action="store_true", default=None, help="measure the radius in units of each weight's norm")
    add(
        "--start", type=float, help="the point's start, from the origin (0, the ball's) to the weight (1, the sphere's)"
    )
    add("--point-lr", type=float, help="0.15 by default, 1 with other rules than spectral")
    add("--point-lr-power", type=float, help="0.75 and 1: the point's learning rate is point_lr * lr**point_lr_power")
    add("--point-momentum", type=float, help="0.95 and 0")
    add("--point-decay", type=float, help="of the point towards the origin, 0.02 and 0")
    add("--report", type=Path, metavar="DIR", help="write flips, a picture and fused copies of saved checkpoints there")
    add("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    own, target = _split(argv, parser)
    args = vars(parser.parse_args(own))
    report, module, where = args.pop("report"), args.pop("module"), args.pop("where")
    options = {name: value for name, value in args.items() if value is not None}
    try:
        make_settings(**{name: value for name, value in options.items() if name not in ("binarize", "mode")})
    except ValueError as error:
        parser.error(str(error))
    if where:
        options["where"] = by_name(*where)
    if module is None and not target:
        parser.error("name the script to run")
    if module is None and not Path(target[0]).is_file():
        parser.error(f"there is no script {target[0]}")
    return options, report, [module, *target] if module is not None else target, module is not None


def _split(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Our own options, and from the script (or what follows ``-m module``) on its own."""
    flags = {flag for action in parser._actions for flag in action.option_strings if action.nargs == 0}
    i = 0
    while i < len(argv) and argv[i].startswith("-"):
        if argv[i].startswith("-m"):  # -m package, or -mpackage
            end = i + (2 if argv[i] == "-m" else 1)
            return list(argv[:end]), list(argv[end:])
        i += 1 if argv[i] in flags or "=" in argv[i] else 2
    return list(argv[:i]), list(argv[i:])
