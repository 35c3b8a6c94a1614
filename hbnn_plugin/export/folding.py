"""A model's computation with every constant worked out, as other runtimes take it.

Hosts derive their binary weight in each forward, in Python that no exporter takes whole (``.item()``, ``kthvalue``,
``self.weight.data = ...``). So one real forward is traced, and what each convolution was given there as its weight
becomes a constant, bit for bit; the code that computed it falls away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from .capture import plain_copy
from .graphs import CONVOLUTION_FUNCTIONS, add_constant, constants, convolutions
from .running import follow

__all__ = ["Folded", "fold"]


class Folded(NamedTuple):
    """What :func:`fold` finds."""

    graph: fx.GraphModule
    """The model in torch's own operators; whatever does not depend on the input is a tensor that it holds."""
    layers: tuple[str, ...]
    """The qualified name of the module that runs each convolution, in the order of :func:`convolutions`."""
    example: Tensor
    """The example input, on the CPU."""
    output: Tensor
    """Of the model itself, untraced, for the example."""


@torch.no_grad()
def fold(model: nn.Module, example_input: Tensor) -> Folded:
    """Trace a copy of the model in evaluation mode, on the CPU, and work out all that does not depend on its input.

    Args:
        model: applied, in either mode, fused, or never applied; of float32. It stays as it is.
        example_input: its one argument, float32.

    Raises:
        TypeError: the example is not a tensor.
        ValueError: the model or the example is not float32; the model does not return one tensor of two dimensions or
            more, or not a finite one; its forward cannot be traced, such as where it asks a tensor for a decision.
    """
    _check_dtypes(model, example_input)
    example = example_input.detach().cpu()
    output = plain_copy(model).cpu()(example.clone())  # which it may begin by changing in place
    if not isinstance(output, Tensor) or output.ndim < 2 or not bool(output.isfinite().all()):
        raise ValueError(
            f"{type(model).__name__} has to return one tensor of finite logits, (N, classes, ...), for the example; "
            f"it returns {_described(output)}"
        )
    plain, watch = plain_copy(model).cpu(), _Watch()
    try:
        traced = make_fx(lambda x: watch.run(plain, x), pre_dispatch=True)(example.clone())
    except Exception as error:
        raise ValueError(f"the forward of {type(model).__name__} cannot be traced: {error}") from error
    apart = float((traced(example.clone()) - output).abs().max())
    if not apart <= 1e-4 * float(output.abs().max()):
        raise ValueError(
            f"the forward of {type(model).__name__} cannot be traced: its trace gives logits that differ by up to "
            f"{apart:.3g}. Does it write to an activation's .data? No trace shows that: compute the sign in a "
            "torch.autograd.Function, or add (x.sign() - x).detach()"
        )
    return Folded(traced, _fold_constants(traced, watch), example, output)


class _Watch(TorchFunctionMode):
    """Which module runs each convolution, and with which weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.weights: list[Tensor] = []
        self._running: list[str] = []

    def run(self, model: nn.Module, x: Tensor) -> Any:
        """What the model returns."""
        with follow(model) as self._running, self:
            return model(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTION_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.layers.append(self._running[-1])
            self.weights.append(weight.detach().clone())  # its host may put other values there
        return func(*args, **kwargs)


def _check_dtypes(model: nn.Module, example_input: Tensor) -> None:
    if not isinstance(example_input, Tensor):
        raise TypeError(f"the example input has to be one tensor, not a {type(example_input).__name__}")
    tensors = {"the example input": example_input, **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"exports are of float32; {name} is {tensor.dtype}: use .float() before")


def _described(output: Any) -> str:
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    bad = int((~output.isfinite()).sum())
    return f"a tensor of shape {tuple(output.shape)} with {bad} non-finite value(s)"


def _fold_constants(module: fx.GraphModule, watch: _Watch) -> tuple[str, ...]:
    """Put tensors in the place of all that does not depend on the input; return which layers run what is left."""
    known = constants(module)
    graph = module.graph
    layers = []
    for layer, weight, conv in zip(watch.layers, watch.weights, convolutions(graph), strict=True):
        if conv in known:
            continue
        layers.append(layer)
        if conv.args[1] in known:  # else it depends on the input
            with graph.inserting_before(conv):
                conv.update_arg(1, add_constant(module, f"{layer}.weight", weight))
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if node not in known and source in known and source.op != "get_attr":
                with graph.inserting_before(node):
                    node.replace_input_with(source, add_constant(module, source.name, known[source]))
    for node in reversed(known):
        if not node.users:
            graph.erase_node(node)
    module.recompile()
    return tuple(layers)
