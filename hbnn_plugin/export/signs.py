"""Recognizes, in a traced graph, a tensor that is a sign: by what it does to numbers, not by how its host writes it.

Hosts write sign(x) as ``x.sign()``, ``x.sign().add(.5).sign()``, ``torch.where(x >= 0, 1, -1)``, ``(x > 0) * 2. - 1``,
or as a sum of a smooth estimator and detached differences. All are made of elementwise operators; so the operators
between the tensor and one earlier tensor are run on a few numbers, and are a sign if what comes out is a step at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

__all__ = ["Step", "find_step"]

_ALSO_ELEMENTWISE = frozenset(
    "_to_copy alias clone contiguous detach full_like lift_fresh_copy ones_like to zeros_like".split()  # noqa: SIM905
)

_SIZES = (1e-30, 1e-6, 0.3, 1.0, 1.5, 7.0, 100.0)

_TOLERANCE = 1e-4
"""Of the height: a smooth estimator that is added and subtracted leaves rounding."""


class Step(NamedTuple):
    """A tensor that is +height where ``source`` is positive and −height where it is negative."""

    source: fx.Node
    height: float
    """Not zero; may be negative."""
    at_zero: float
    """+height, −height, or a third value: ``torch.sign`` has 0."""

    @property
    def is_two_valued(self) -> bool:
        return abs(self.at_zero) == abs(self.height)


def find_step(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> Step | None:
    """The step that ``node`` is, of the nearest tensor of which it is one; None if it is no step at zero.

    A step of two values is preferred to one that has a third at zero: of sign(sign(x) + ½) the source is x, and not
    the sum, which happens never to be zero.

    Args:
        node: of a graph of torch's operators without mutation.
        constants: node → value, of everything that does not depend on the graph's input.
    """
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    between: list[fx.Node] = []
    frontier = {node}
    three_valued: Step | None = None
    while frontier:
        latest = max(frontier, key=order.__getitem__)
        if between and len(frontier) == 1 and latest.meta["val"].is_floating_point():
            step = _step(latest, between[::-1], constants)
            if step is not None and step.is_two_valued:
                return step
            three_valued = three_valued or step
        if not _is_elementwise(latest, constants):
            break
        between.append(latest)
        frontier.remove(latest)
        frontier |= {source for source in latest.all_input_nodes if source not in constants}
    return three_valued


def _is_elementwise(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> bool:
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in operator.tags and operator.overloadpacket.__name__ not in _ALSO_ELEMENTWISE:
        return False
    return all(constants[source].numel() == 1 for source in node.all_input_nodes if source in constants)


def _step(source: fx.Node, operators: list[fx.Node], constants: Mapping[fx.Node, Tensor]) -> Step | None:
    """What the operators, in their order, make of numbers in the place of ``source``."""
    sizes = torch.tensor(_SIZES, device="cpu").view(-1, 1, 1, 1)
    values: dict[fx.Node, Any] = {**constants, source: torch.cat([-sizes, torch.zeros_like(sizes[:1]), sizes])}
    try:
        for node in operators:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:  # an operator that counts on the real tensor's shape
        return None
    result = values[operators[-1]].flatten().float()
    if len(result) != 2 * len(sizes) + 1:
        return None
    below, at_zero, above = result.split([len(sizes), 1, len(sizes)])
    height = float(above[0])
    off = torch.cat([above - height, below + height]).abs().max()
    if not height or not bool(off <= _TOLERANCE * abs(height)):
        return None
    zero = float(at_zero)
    nearest = height if zero * height > 0 else -height
    return Step(source, height, nearest if abs(zero - nearest) <= _TOLERANCE * abs(height) else zero)
