"""The committed tables are those that the committed lines give, by the commands that README names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import benchmark_latency
import benchmark_training
import defaults
import reproduce

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = reproduce.RESULTS
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TABLE5 = re.search(r"reproduce\.py (table5 .*) --report", README)
assert TABLE5, "README names the command of its table"
REPORTS = {
    "table5-small.md": ("reproduce-small.jsonl", reproduce.main, shlex.split(TABLE5[1])),
    "ablation-small-0.6-0.0001.md": (
        "reproduce-small.jsonl",
        reproduce.main,
        ["ablation", "--setting", "0.6", "1e-4"],
    ),
    "training-cost.md": ("training-cost.jsonl", benchmark_training.main, []),
    "latency.md": ("latency.jsonl", benchmark_latency.main, []),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_committed_report_is_of_the_committed_lines(name: str, tmp_path: Path) -> None:
    lines, main, arguments = REPORTS[name]
    run: Callable[[list[str]], None] = main
    shutil.copy(RESULTS / lines, tmp_path)
    run([*arguments, "--results", str(tmp_path), "--report"])
    assert (tmp_path / name).read_text(encoding="utf-8") == (RESULTS / name).read_text(encoding="utf-8")


HOSTS = {"IR-Net": "irnet", "plain sign network": "plain", "ReCU": "recu", "SiMaN": "siman"}


def table_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows, without emphasis."""
    return [line.replace("**", "").strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_first_table_of_readme_quotes_the_committed_one() -> None:
    report = table_rows((RESULTS / "table5-small.md").read_text(encoding="utf-8"))
    committed = {(row[0].split(", ")[-1], row[1]): row for row in report if row[0].startswith("cifar10 resnet8, ")}
    quoted = table_rows(README[README.index("| host | alone |") : README.index("Two commands")])[1:]
    assert len(quoted) == len(HOSTS) + 1
    for name, alone, with_plugin, gain in quoted:
        host = HOSTS[name.split(",")[0]]
        bare, arm = committed[host, "bare"], committed[host, "HBNN" if "mobius" in name else "HBNN, spectral"]
        points, interval, pairs = re.fullmatch(r"(\S+), (.*) \((\d+) pairs\)", gain).groups()  # type: ignore[union-attr]
        assert alone.removesuffix(" %") == bare[3].split(" (")[0]
        assert with_plugin.removesuffix(" %") == arm[3].split(" (")[0]
        assert (f"{points} ({pairs})", interval) == (arm[5], arm[6])


def test_the_table_of_the_defaults_is_that_of_its_lines() -> None:
    lines = [json.loads(line) for line in defaults.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert defaults.report(lines) in defaults.RESULTS.with_suffix(".md").read_text(encoding="utf-8")
