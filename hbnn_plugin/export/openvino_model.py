"""Inference with XNOR and popcount: a trained network in OpenVINO, its binary layers as ``BinaryConvolution``.

Of each binary layer OpenVINO gets its input through FakeQuantize(levels=2), which makes it 0 or 1, the filter as a
``u1`` constant, least significant bit first, and the scale as a product behind, which it folds together with BatchNorm.
Zeros that pad the signs stay zeros (``pad_value`` 0).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..diagnostics.tables import table
from ..host.bits import pack_bits
from .agreement import Agreement, agreement
from .binary_graph import OPERATOR, FoundLayer, with_binary_convolutions
from .folding import fold

if TYPE_CHECKING:
    import numpy as np
    import openvino

__all__ = ["XnorModel", "runtime_core", "to_openvino"]

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")

_JUST_BELOW_ZERO = -1e-30
"""FakeQuantize takes what is not above its bound for 0, so zero itself needs a bound below; the smallest floats are
none, since a folded BatchNorm divides the bound, and CPUs flush what underflows."""


_NODE = "hbnn_plugin_"
"""What the names of our nodes begin with; the number of the layer follows."""


class XnorModel:
    """A compiled model: call it on inputs of the example's shape. Its repr is a table of its binary layers."""

    def __init__(
        self,
        graph: openvino.Model,
        compiled: openvino.CompiledModel,
        layers: tuple[FoundLayer, ...],
        input_shape: tuple[int, ...],
    ) -> None:
        self.graph = graph
        """For ``openvino.save_model``, or to compile it with other properties."""
        self.compiled = compiled
        self.layers = layers
        """Those with binary weights; ``binary`` as the compiled model's own execution graph says."""
        self.input_shape = input_shape
        self.agreement: Agreement | None = None
        """With torch, on the example input."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say about single layers."""
        return tuple(f"{layer.name}: {layer.note}" for layer in self.layers if layer.note)

    def __call__(self, x: Array) -> Array:
        """Logits for an input of ``input_shape``: a tensor for a tensor, an array for an array."""
        if tuple(x.shape) != self.input_shape:
            raise ValueError(
                f"compiled for inputs of shape {self.input_shape}, not {tuple(x.shape)}: call to_openvino with an "
                "example of that shape"
            )
        array = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x
        logits: np.ndarray[Any, Any] = self.compiled(array.astype("float32", copy=False))[0]
        logits = logits.copy()  # the runtime uses its memory again
        return torch.from_numpy(logits) if isinstance(x, Tensor) else logits

    def __repr__(self) -> str:
        count = sum(layer.binary for layer in self.layers)
        title = f"OpenVINO, inputs of shape {self.input_shape}: {count} of {len(self.layers)} layers run on bits"
        rows = [
            (layer.name, "×".join(map(str, layer.shape)), layer.kernel if layer.binary else "float", layer.note)
            for layer in self.layers
        ]
        return "\n".join(
            [table(title, ("layer", "weight", "runs as", "note"), rows), f"against torch: {self.agreement}"]
        )


def to_openvino(
    model: nn.Module, example_input: Tensor, *, threads: int | None = None, tolerance: float | None = 0.1
) -> XnorModel:
    """Compile a trained network for this CPU, binary layers on 1-bit operands. The model stays as it is.

    What each layer convolves with, and what it takes for a sign, is captured from one forward in evaluation mode. A
    layer with binary weights stays a float convolution, with a note, where its input is not binary, where it has
    groups, or where ``torch.sign`` maps zeros of the example to a third value. Everything else of the model runs in
    float32, with BatchNorm and scales folded into the layers before.

    Args:
        model: applied, in either mode, fused, or never applied; of float32.
        example_input: its one argument, of the shape that it is compiled for.
        threads: that OpenVINO uses; by default all cores.
        tolerance: how far logits may be from torch's on the example, as a share of the largest; None checks nothing.

    Raises:
        ValueError: no convolution of the model has binary weights; the model cannot be traced
            (:func:`hbnn_plugin.export.folding.fold`); on the example OpenVINO's top-1 is not torch's, or a logit is
            further from it than the tolerance.
        ImportError: openvino is not installed.
    """
    ov = _openvino()
    folded = fold(model, example_input)
    program, found = with_binary_convolutions(folded, model)
    if not found:
        raise ValueError(f"no convolution of {type(model).__name__} has binary weights in evaluation mode")
    extension = ov.frontend.pytorch.ConversionExtension(f"{OPERATOR.replace('::', '.')}.default", _translation(ov))
    graph = ov.convert_model(program, extension=[extension])
    graph.reshape(list(folded.example.shape))
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    compiled = runtime_core().compile_model(graph, "CPU", properties)
    kernels = _binary_kernels(compiled)
    for i, layer in enumerate(found):
        if i in kernels:
            found[i] = layer._replace(kernel=kernels[i])
        elif layer.binary:
            found[i] = layer._replace(binary=False, note="OpenVINO runs it in float on this machine")
    result = XnorModel(graph, compiled, tuple(found), tuple(folded.example.shape))
    result.agreement = agreement(result(folded.example), folded.output)
    result.agreement.require(tolerance, "OpenVINO")
    return result


def _openvino() -> Any:
    try:
        import openvino  # noqa: PLC0415
        import openvino.frontend.pytorch  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("to_openvino needs openvino: pip install 'hbnn-plugin[openvino]'") from error
    return openvino


@cache
def runtime_core() -> openvino.Core:
    """The one ``openvino.Core`` of this process, never released.

    Each core gives the process an alternative signal stack and takes it away in its end; when two go in the order in
    which they came, the older one's, by then unmapped, is put back, and the next signal (Ctrl-C, a DataLoader's worker
    that ends) kills the process.
    """
    core: openvino.Core = _openvino().Core()
    return core


def _translation(ov: Any) -> Callable[[Any], Any]:
    """What OpenVINO's PyTorch front end makes of our operator."""
    operators = ov.opset1

    def single(value: float) -> Any:
        return operators.constant(torch.full((1, 1, 1, 1), value, device="cpu").numpy())

    def translate(call: Any) -> Any:
        weight = torch.from_numpy(call.get_input(1).get_node().data.copy())
        options = [call.get_values_from_const_input(i) for i in range(2, 7)]
        stride, padding, dilation, zero_is_positive, layer = options
        # A tensor of OpenVINO's own: it does not keep memory of others alive.
        bits = ov.Tensor(ov.Type.u1, ov.Shape(list(weight.shape)))
        bits.data[:] = pack_bits(weight > 0).numpy()
        bound = single(_JUST_BELOW_ZERO if zero_is_positive else 0.0)
        data = operators.fake_quantize(call.get_input(0), bound, bound, single(0), single(1), 2)
        convolved = operators.binary_convolution(
            data, ov.op.Constant(bits, shared_memory=False), stride, padding, padding, dilation, "xnor-popcount", 0.0
        )
        scale = weight.abs().amax((1, 2, 3)).reshape(1, -1, 1, 1).numpy()
        scaled = operators.multiply(convolved, operators.constant(scale))
        convolved.set_friendly_name(f"{_NODE}{layer}_convolved")
        scaled.set_friendly_name(f"{_NODE}{layer}_scaled")  # a product with ones falls away and leaves its name
        return scaled.outputs()

    return translate


def _binary_kernels(compiled: openvino.CompiledModel) -> dict[int, str]:
    """The number of a layer → kernel, of every binary convolution in the graph that really runs."""
    kernels = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {
            key: node.get_rt_info()[key].astype(str) for key in ("layerType", "primitiveType", "originalLayersNames")
        }
        layer = re.search(rf"\b{_NODE}(\d+)_", info["originalLayersNames"])
        if layer and info["layerType"] == "BinaryConvolution":
            kernels[int(layer[1])] = info["primitiveType"]
    return kernels
