"""The training benchmark: one small case of each section, and the report from its lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmark_training
from hosts.networks import NETWORKS, resnet8
from training_cost.cases import CASES, Case
from training_cost.launches import measure_launches
from training_cost.maps import measure_map, one_layer, weights_of
from training_cost.steps import BARE, measure_memory, measure_step

ARCH = "tiny resnet8"

TINY = [
    Case("map", "one layer", lambda turns: measure_map(one_layer(4, 64), turns), 2),
    Case("map", "a network", lambda turns: measure_map(weights_of(ARCH, "layer"), turns, compiled=False), 2),
    Case("growth", "one point", lambda turns: measure_map(one_layer(1, 1024), turns, compiled=False), 2),
    Case("step", "eager", lambda turns: measure_step("irnet", ARCH, 2, "eager", turns), 2),
    Case("step", "bf16", lambda turns: measure_step("recu", ARCH, 2, "bf16", turns), 2),
    Case("launches", "float32", lambda _: measure_launches("irnet", ARCH, torch.float32), 1),
    Case("memory", "batch 2", lambda _: measure_memory("irnet", ARCH, 2), 1),
]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """In place of torch.compile, which takes longer than all the rest."""
    return function


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training-cost.jsonl").read_text().splitlines()]


def test_a_case_of_each_section_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, ARCH, lambda conv, num_classes=10: resnet8(conv, num_classes, width=4))
    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(benchmark_training, "CASES", TINY)
    options = ["--results", str(tmp_path)]
    benchmark_training.main([*options, "--only", "launches", "memory"])
    benchmark_training.main([*options, "--cases", "network", "--turns", "3"])
    benchmark_training.main(options)
    done = {(line["section"], line["case"]): line for line in lines(tmp_path)}
    benchmark_training.main(options)  # nothing is missing
    assert lines(tmp_path) == list(done.values())
    assert [section for section, _ in done] == ["launches", "memory", "map", "map", "growth", "step", "step"]
    assert {section for section, _ in done} == set(benchmark_training.SECTIONS)
    for line in done.values():
        for estimates in (line.get("milliseconds", {}), line.get("ratio to the floor", {})):
            assert all(0 < e["low"] <= e["median"] <= e["high"] for e in estimates.values())
    assert set(done["map", "one layer"]["milliseconds"]) > set(done["map", "a network"]["milliseconds"])
    for kind in ("eager", "bf16"):
        assert {*done["step", kind]["ratio to the bare host"], BARE} == set(done["step", kind]["milliseconds"])
    launches = done["launches", "float32"]["launches"]
    assert all(counts["forward"] > launches[BARE]["forward"] > 0 for arm, counts in launches.items() if arm != BARE)
    memory = done["memory", "batch 2"]
    # points, their momentum, in-place the latents
    held = {"parametrize": 2, "in-place": 3, "parametrize, Möbius rule": 1}
    assert memory["copies held"] == pytest.approx(held, abs=0.2)
    assert set(memory["copies at the peak"]) == set(memory["copies held"])

    benchmark_training.main([*options, "--report"])
    report = (tmp_path / "training-cost.md").read_text()
    assert report.count("\n## ") >= len(benchmark_training.SECTIONS)
    assert all(report.count(f"\n| {case} |") == 1 for _, case in done)
    benchmark_training.main([*options, "--cases", "eager", "--again"])
    assert [line["case"] for line in lines(tmp_path)].count("eager") == 2
    benchmark_training.main([*options, "--report"])
    assert (tmp_path / "training-cost.md").read_text().count("\n| eager |") == 1  # the last line counts


def test_a_damaged_line_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "training-cost.jsonl").write_text('{"section": "map"\n{}\n')
    with pytest.raises(SystemExit, match=r"^benchmark_training\.py: .*training-cost\.jsonl"):
        benchmark_training.main(["--results", str(tmp_path), "--report"])


def test_cases_have_names_of_their_own() -> None:
    names = [(case.section, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.section for case in CASES} == set(benchmark_training.SECTIONS)
