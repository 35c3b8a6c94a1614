"""Traced graphs of torch's operators: their convolutions, what is constant in them, weights of ±scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..host.convolved import CONVOLUTIONS
from .capture import scales_of

__all__ = [
    "CONVOLUTION_FUNCTIONS",
    "SignsAndScales",
    "add_constant",
    "constants",
    "convolutions",
    "operands",
    "signs_and_scales",
]

CONVOLUTION_FUNCTIONS = CONVOLUTIONS - {F.linear}
_OPERATORS = frozenset(f.__name__ for f in CONVOLUTION_FUNCTIONS)


def convolutions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The convolutions of a graph of torch's operators; their arguments begin with data and weight."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket.__name__ in _OPERATORS:
            yield node


def operands(conv: fx.Node) -> tuple[Any, ...]:
    """Data, weight and bias (or None) of a convolution, and the rest of its arguments."""
    return *conv.args, *[None] * (3 - len(conv.args))


def constants(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Node → value, of everything in the graph that does not depend on its input."""
    known: dict[fx.Node, Any] = {}
    varying = _varying(module.graph)
    for node in module.graph.nodes:
        if node in varying:
            continue
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the input, also since something that does is written into it (``out[:, :8] = x``)."""
    varying: set[fx.Node] = set()
    before = -1
    while before < len(varying):
        before = len(varying)
        for node in graph.nodes:
            if node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
                varying.update(_written(node))
    return varying


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What a node writes into, and what that is a view of."""
    arguments = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    for place, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            target = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            while isinstance(target, fx.Node):
                yield target
                target = _viewed(target)


def _viewed(node: fx.Node) -> Any:
    """The tensor whose memory the result of a node is in; None if it has its own."""
    first = next(iter(node.target._schema.arguments), None) if isinstance(node.target, torch._ops.OpOverload) else None
    return node.args[0] if first is not None and first.alias_info is not None else None


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
