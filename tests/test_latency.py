"""The latency benchmark: one small case of each section, and the report from its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hosts.networks import resnet8

pytest.importorskip("openvino")

import benchmark_latency
from latency import cases, equality, inference, networks
from latency.equality import Equality
from latency.inference import Inference
from latency.networks import Network

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:nncf.*"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning"),
]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "latency.jsonl").read_text().splitlines()]


def test_a_case_of_each_section_and_the_report(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Inference(Network("irnet", "resnet8"), 1, 1)
    equal = Equality(Network("irnet", "resnet8"), 2)
    monkeypatch.setitem(networks._ARCHS, "resnet8", lambda conv: resnet8(conv, width=8))
    monkeypatch.setattr(benchmark_latency, "INFERENCE", [tiny])
    monkeypatch.setattr(benchmark_latency, "EQUALITY", [equal])
    monkeypatch.setattr(inference, "FEWEST", 2)
    monkeypatch.setattr(equality, "IMAGES", 200)
    options = ["--results", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seconds", "0"]
    benchmark_latency.main(options)
    benchmark_latency.main([*options, "--equality", str(data)])
    done = lines(tmp_path)
    benchmark_latency.main(options)  # nothing is missing
    assert lines(tmp_path) == done and [line["section"] for line in done] == ["inference", "equality"]
    measured, compared = done
    assert measured["binary layers"] == len(measured["layers"]) == 6
    assert measured["agreement with the host"]["fused"]["difference"] < 1e-5
    assert set(measured["milliseconds"]) >= {"host", "fused", "OpenVINO float32", "OpenVINO binary"}
    assert compared["images"] == 200 and len(compared["binary layers"]) == 6
    benchmark_latency.main([*options, "--report"])
    report = (tmp_path / "latency.md").read_text()
    assert report.count(tiny.name) == 2 and "6 of 6" in report and equal.name in report
    assert (tmp_path / "latency.png").stat().st_size > 1000


def test_cases_have_names_of_their_own() -> None:
    for section in (cases.INFERENCE, cases.EQUALITY):
        names = [case.name for case in section]
        assert len(set(names)) == len(names)
