"""Tables and the picture, from the lines alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from latency.ways import APPLIED, BINARY, CHANNELS_LAST, FLOAT, FOLDED, FUSED, HOST, INT8
from markdown_tables import interval, table
from provenance import by_processor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Line = Mapping[str, Any]

__all__ = ["draw", "tables"]

_WAYS = (HOST, APPLIED, FUSED, FOLDED, CHANNELS_LAST, FLOAT, INT8, BINARY)

_HEAD = """# Latency

Made by `python examples/benchmark_latency.py --report` from `latency.jsonl`. Medians over turns in one process, in
which all ways run one after another, with 95 % bootstrap intervals; ratios are taken within a turn. Load: the machine's
load average meanwhile. int8, quantized by NNCF's defaults without training, is here for its speed: its outputs differ
from the host's.
"""


def tables(lines: Sequence[Line]) -> str:
    """All sections in Markdown by processor, of each case its last line there."""
    parts = [_HEAD]
    for section, title, tabulated in (
        ("inference", "## Inference, milliseconds", _inference),
        ("inference", "## Inference, as a multiple of OpenVINO binary", _ratios),
        ("inference", "## What ran on 1-bit operands, by OpenVINO's own execution graph", _layers),
        ("inference", "## Where OpenVINO spends the time, milliseconds by kind of node", _profiles),
        ("equality", "## The same classes? 1,000 CIFAR-10 test images, networks trained on real ones", _equality),
    ):
        if found := _of_section(lines, section):
            parts.append(title)
            for processor, measured in found.items():
                parts += [f"{processor}:", tabulated(measured)]
    machines = sorted({", ".join(f"{key} {line[key]}" for key in _CIRCUMSTANCES if key in line) for line in lines})
    parts += ["## Machines and versions", "\n".join(f"* {machine}" for machine in machines)]
    return "\n\n".join(parts) + "\n"


_CIRCUMSTANCES = ("machine", "torch", "openvino", "nncf", "plugin", "commit")


def _of_section(lines: Sequence[Line], section: str) -> dict[str, list[Line]]:
    """By processor the last line of each case of a section, in the order of first lines."""
    found = by_processor(line for line in lines if line["section"] == section)
    return {processor: [*{line["case"]: line for line in measured}.values()] for processor, measured in found.items()}


def draw(lines: Sequence[Line], path: Path) -> None:
    """Latency of every way by network, batch 1 on one thread, on the processor of the latest line."""
    (processor, measured) = [*_of_section(lines, "inference").items()][-1]
    shown = [line for line in measured if line["batch"] == line["threads"] == 1]
    figure = Figure(figsize=(1.6 * max(len(shown), 4), 4.2), layout="constrained")
    axis = figure.subplots()
    names = [way for way in _WAYS if any(way in line["milliseconds"] for line in shown)]
    for i, way in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(shown))]
        _bars(axis, places, 0.8 / len(names), [line["milliseconds"].get(way) for line in shown], way)
    axis.set_xticks(range(len(shown)), [line["network"].replace(" ", "\n", 1) for line in shown])
    axis.set(
        yscale="log",
        ylabel="milliseconds, median and 95 % interval",
        title=f"Inference, batch 1, one thread, {processor}",
    )
    axis.legend(fontsize=8, ncols=4, loc="upper left")
    low, high = axis.get_ylim()
    axis.set_ylim(low, 5 * high)  # room for the legend
    figure.savefig(path, dpi=150)


def _bars(axis: Any, places: Sequence[float], width: float, estimates: Sequence[Line | None], label: str) -> None:
    there = [(place, e) for place, e in zip(places, estimates, strict=True) if e]
    height = [e["median"] for _, e in there]
    below, above = ([abs(e["median"] - e[end]) for _, e in there] for end in ("low", "high"))
    axis.bar([place for place, _ in there], height, width, yerr=[below, above], label=label, error_kw={"linewidth": 1})


def _inference(lines: Sequence[Line]) -> str:
    names = [way for way in _WAYS if any(way in line["milliseconds"] for line in lines)]
    rows = [
        [line["case"], *(interval(line["milliseconds"].get(way)) for way in names), line["turns"], line["load"]]
        for line in lines
    ]
    return table(["case", *names, "turns", "load"], rows)


def _ratios(lines: Sequence[Line]) -> str:
    names = [way for way in _WAYS if way != BINARY and any(way in line["milliseconds"] for line in lines)]
    rows = [
        [
            line["case"],
            *(interval(line["times as long as binary"].get(way)) for way in names),
            interval(line["fused / host"]),
            *(_agreed(line["agreement with the host"].get(way)) for way in (FUSED, FLOAT, INT8, BINARY)),
        ]
        for line in lines
    ]
    header = [
        "case",
        *names,
        "fused / host",
        "same top-1 as the host (largest difference): fused",
        "float32",
        "int8",
        "binary",
    ]
    return table(header, rows)


def _layers(lines: Sequence[Line]) -> str:
    by_network = {line["network"]: line for line in lines}
    rows = []
    for network, line in by_network.items():
        others = [f"{name}: {what}" for name, what in line["layers"].items() if "u1" not in what]
        kernels = sorted({what for what in line["layers"].values() if "u1" in what})
        rows.append(
            [network, f"{line['binary layers']} of {len(line['layers'])}", ", ".join(kernels), "; ".join(others)]
        )
    return table(["network", "layers with binary weights that ran binary", "kernel", "others"], rows)


def _profiles(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        if line["batch"] == line["threads"] == 1:
            for way in (FLOAT, BINARY):
                spent = [f"{kind} {ms:.2f}" for kind, ms in line["profiles"][way].items() if ms >= 0.01]
                rows.append([line["network"], way, ", ".join(spent)])
    return table(["network, batch 1, 1 thread", "way", "milliseconds"], rows)


def _equality(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        for way, agreed in line["agreement"].items():
            rows.append(
                [
                    line["case"],
                    way,
                    f"{line['accuracy'][way]:.1%}",
                    f"{agreed['same_top1']} of {agreed['rows']}",
                    f"{agreed['difference']:.2g} of {agreed['largest']:.2g}",
                    line["images apart"][way],
                ]
            )
    header = ["network", "way", "accuracy", "same top-1", "largest difference, largest logit", "images apart"]
    note = (
        "Images are apart where logits differ by more than 1/1000 of the largest: an activation next to zero was "
        "rounded to the other side. What that does to torch alone, when it adds in another order, is the line "
        "without oneDNN."
    )
    return f"{table(header, rows)}\n\n{note}"


def _agreed(agreement: Line | None) -> str:
    return f"{agreement['same_top1']} of {agreement['rows']} ({agreement['difference']:.1g})" if agreement else ""
