"""A model's computation with every constant worked out, as other runtimes take it.

Hosts derive their binary weight in each forward, in Python that no exporter takes whole (``.item()``, ``kthvalue``,
``self.weight.data = ...``). So one real forward is traced, and what each convolution was given there as its weight
becomes a constant, bit for bit; the code that computed it falls away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ..host.convolved import CONVOLUTIONS
from .capture import plain_copy, scales_of
from .running import follow

__all__ = ["Folded", "SignsAndScales", "add_constant", "constants", "convolutions", "fold", "signs_and_scales"]

_CONVOLUTIONS = CONVOLUTIONS - {F.linear}
_OPERATORS = frozenset(f.__name__ for f in _CONVOLUTIONS)


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
    _fold_constants(traced, watch)
    return Folded(traced, tuple(watch.layers), example, output)


def convolutions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The convolutions of a graph of torch's operators; their arguments begin with data and weight."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in _OPERATORS:
            yield node


def constants(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Node → value, of everything in the graph that does not depend on its input."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(source in known for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def add_constant(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """A node for a new buffer of about that name."""
    target = name.replace(".", "_")
    while hasattr(module, target):
        target += "_"
    module.register_buffer(target, value.detach().clone().contiguous())
    return module.graph.get_attr(target)


class SignsAndScales(NamedTuple):
    """A weight that is ±scale, one scale a filter."""

    signs: Tensor
    """±1, of the weight's shape."""
    scales: Tensor
    """One number ≥ 0 a filter."""


def signs_and_scales(weight: Tensor) -> SignsAndScales | None:
    """Take a convolved weight apart; None if it is not ±scale up to roundings, or has but one number a filter."""
    scales, far = scales_of(weight, (0,))
    if weight.numel() < 2 * len(weight) or bool(far.any()):
        return None
    return SignsAndScales(torch.where(weight.signbit(), -1.0, 1.0), scales)


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
        if func in _CONVOLUTIONS:
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


def _fold_constants(module: fx.GraphModule, watch: _Watch) -> None:
    """Put tensors in the place of everything that does not depend on the input, and drop what computed them."""
    known = constants(module)
    graph = module.graph
    for layer, weight, conv in zip(watch.layers, watch.weights, convolutions(graph), strict=True):
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
