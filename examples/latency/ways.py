"""Ways to run one network: torch as the host does it, fused, and OpenVINO in three precisions."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.export import to_openvino
from hbnn_plugin.export.folding import fold
from hbnn_plugin.export.openvino_model import runtime_core

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbnn_plugin.export.folding import Folded
    from hbnn_plugin.export.openvino_model import XnorModel

__all__ = [
    "APPLIED",
    "BINARY",
    "CHANNELS_LAST",
    "FLOAT",
    "FOLDED",
    "FUSED",
    "HOST",
    "INT8",
    "Ways",
    "compile_graph",
    "float_graph",
    "ways",
]

HOST = "host"
APPLIED = "host + HBNN"
FUSED = "fused"
FOLDED = "torch, weights worked out"
CHANNELS_LAST = "the same, channels_last"
FLOAT = "OpenVINO float32"
INT8 = "OpenVINO int8"
BINARY = "OpenVINO binary"

PROFILED = 20
"""Runs that a profile is the mean of."""


class Ways(NamedTuple):
    """One network on one input."""

    arms: dict[str, Callable[[], np.ndarray[Any, Any]]]
    """Way → what returns its logits."""
    xnor: XnorModel
    profiles: dict[str, dict[str, float]]
    """Way of OpenVINO's → kind of node → milliseconds in it."""


def ways(model: nn.Module, x: Tensor, threads: int) -> Ways:
    """All ways to run an applied model, or one never applied, which then is applied for some of them.

    int8 is NNCF's post-training quantization with its defaults, and left out where NNCF is not installed.
    """
    torch.set_num_threads(threads)
    bare, applied = model, hbnn_plugin.apply(copy.deepcopy(model)).eval()
    fused = hbnn_plugin.fuse(copy.deepcopy(applied))
    folded = fold(fused, x)
    plain = float_graph(folded)
    xnor = to_openvino(fused, x, threads=threads, tolerance=None)
    quantized = _quantized(plain, x)
    graphs = {FLOAT: plain, **({INT8: quantized} if quantized else {}), BINARY: xnor.graph}
    arms: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
        name: _in_torch(run, x)
        for name, run in {HOST: bare, APPLIED: applied, FUSED: fused, FOLDED: folded.graph}.items()
    }
    arms[CHANNELS_LAST] = _in_torch(_in_channels_last(folded.graph), x.contiguous(memory_format=torch.channels_last))
    array = x.numpy()
    for name, graph in graphs.items():
        compiled = compile_graph(graph, threads)
        arms[name] = lambda compiled=compiled: compiled(array)[0]  # type: ignore[misc]
    return Ways(arms, xnor, {name: _profile(graph, array, threads) for name, graph in graphs.items()})


def float_graph(folded: Folded) -> Any:
    """The model as OpenVINO translates it by itself, with ±scale weights in float32."""
    graph = _openvino().convert_model(torch.export.export(folded.graph, (folded.example,)))
    graph.reshape(list(folded.example.shape))
    return graph


def compile_graph(graph: Any, threads: int, **properties: Any) -> Any:
    """For this CPU, with the properties that `to_openvino` sets."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return runtime_core().compile_model(graph, "CPU", {**settings, **properties})


def _openvino() -> Any:
    import openvino  # noqa: PLC0415  # optional, and not needed for a report

    return openvino


def _in_torch(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], np.ndarray[Any, Any]]:
    def call() -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return run(x).numpy()

    return call


def _in_channels_last(graph: nn.Module) -> nn.Module:
    copied: nn.Module = copy.deepcopy(graph).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def _quantized(graph: Any, x: Tensor) -> Any:
    try:
        import nncf  # noqa: PLC0415
    except ImportError:
        return None
    generator = torch.Generator().manual_seed(2)
    inputs = [x.numpy(), torch.randn(x.shape, generator=generator).numpy()]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(graph, nncf.Dataset(inputs), subset_size=len(inputs))


def _profile(graph: Any, array: np.ndarray[Any, Any], threads: int) -> dict[str, float]:
    request = compile_graph(graph, threads, PERF_COUNT=True).create_infer_request()
    spent: dict[str, float] = {}
    for turn in range(PROFILED + 3):
        request.infer([array])
        for node in request.get_profiling_info() if turn >= 3 else ():
            spent[node.node_type] = spent.get(node.node_type, 0) + node.real_time.total_seconds()
    largest = sorted(spent.items(), key=lambda item: -item[1])
    return {kind: round(1e3 * seconds / PROFILED, 4) for kind, seconds in largest if seconds}
