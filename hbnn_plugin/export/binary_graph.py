"""Puts an operator of its own in the place of each convolution of ±1 by ±scale, in a traced model.

The operator, ``hbnn_plugin::binary_conv2d``, computes in torch what the convolution did; runtimes that have a binary
convolution translate it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from ..host.selection import binary_convolutions
from .capture import unwrapped
from .folding import Folded
from .graphs import SignsAndScales, add_constant, constants, convolutions, operands, signs_and_scales
from .signs import Step, find_step

__all__ = ["OPERATOR", "FoundLayer", "with_binary_convolutions"]

_BYTE = 8
"""Channels come in whole bytes: OpenVINO 2026.4 gives wrong numbers for other counts of input channels, in silence."""

OPERATOR = "hbnn_plugin::binary_conv2d"


# The schema is spelled out because torch 2.4 infers none from annotations that are strings.
_SCHEMA = (
    "(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, bool zero_is_positive, int layer) -> Tensor"
)


def _binary_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    zero_is_positive: bool,
    layer: int,
) -> Tensor:
    """Convolve sign(x) with weight; pads sign(x) with zeros. ``layer`` is a number to know it by."""
    positive = x >= 0 if zero_is_positive else x > 0
    return F.conv2d(torch.where(positive, 1.0, -1.0), weight, None, stride, padding, dilation)


torch.library.custom_op(OPERATOR, _binary_conv2d, mutates_args=(), schema=_SCHEMA).register_fake(_binary_conv2d)


class FoundLayer(NamedTuple):
    """A layer with binary weights, or of a class that binarizes."""

    name: str
    """Its qualified name."""
    shape: tuple[int, ...]
    """Of its weight."""
    binary: bool
    """Whether it is a binary convolution."""
    note: str
    """Why it is not, or what is assumed of it; mostly empty."""
    kernel: str = ""
    """The runtime's name for the code that runs it on bits."""


@torch.no_grad()
def with_binary_convolutions(folded: Folded, model: nn.Module) -> tuple[ExportedProgram, list[FoundLayer]]:
    """The model with binary convolutions, as a program for torch's converters; ``layer`` is the place in the list.

    Args:
        folded: of the model.
        model: tells the classes of its layers.
    """
    # Without mutation, and every convolution as aten.convolution with all of its arguments.
    module = make_fx(torch.func.functionalize(folded.graph))(folded.example)
    model, known = unwrapped(model), constants(module)
    convs = list(convolutions(module.graph))
    steps = [find_step(operands(conv)[0], known) for conv in convs]
    zeros = _zeros(module, {step.source for step in steps if step and not step.is_two_valued}, folded.example)
    found: list[FoundLayer] = []
    replaced: dict[fx.Node, fx.Node] = {}
    for name, conv, step in zip(folded.layers, convs, steps, strict=True):
        weight = known.get(operands(conv)[1])
        binary = None if weight is None else signs_and_scales(weight)
        if weight is None or binary is None:
            if binary_convolutions(model.get_submodule(name), name):
                note = "its weight depends on the input" if weight is None else "its weight is not ±scale"
                found.append(FoundLayer(name, () if weight is None else tuple(weight.shape), False, note))
            continue
        obstacle = _obstacle(conv, weight, step, zeros)
        if step is None or obstacle:
            found.append(FoundLayer(name, tuple(weight.shape), False, obstacle))
        else:
            now = step._replace(source=replaced.get(step.source, step.source))  # of a binary layer right before
            replaced[conv] = _replace(module, conv, binary, now, known, layer=len(found))
            assumed = "" if step.is_two_valued else f"sign(0) is {step.at_zero:g} in the model, here +1"
            found.append(FoundLayer(name, tuple(weight.shape), True, assumed))
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, (folded.example,)), found


def _obstacle(conv: fx.Node, weight: Tensor, step: Step | None, zeros: Mapping[fx.Node, int]) -> str:
    """Why a binary convolution would not do for this layer, or nothing."""
    _, _, _, _, _, _, transposed, _, groups = conv.args
    if step is None:
        return "its input is not binary"
    if weight.ndim != 4 or transposed:
        return "the binary convolution is two-dimensional, and not transposed"
    if groups != 1:
        return f"it has {groups} groups, the binary convolution has none"
    if zeros.get(step.source):
        return f"sign(0) is {step.at_zero:g} in the model, and {zeros[step.source]} numbers in the example are 0 there"
    return ""


def _zeros(module: fx.GraphModule, nodes: set[fx.Node], example: Tensor) -> dict[fx.Node, int]:
    """Node → how many elements of its value are exactly zero in the example."""
    zeros: dict[fx.Node, int] = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                zeros[n] = int((value == 0).sum())
            return value

    if nodes:
        Look(module).run(example)
    return zeros


def _replace(
    module: fx.GraphModule,
    conv: fx.Node,
    binary: SignsAndScales,
    step: Step,
    known: Mapping[fx.Node, Tensor],
    layer: int,
) -> fx.Node:
    _, _, bias, stride, padding, dilation, *_ = operands(conv)
    scale = binary.scales.view(-1, 1, 1, 1) * step.height
    more = -binary.signs.shape[1] % _BYTE
    # On channels of −1, filters of +scale and −scale by turns cancel each other, but for an odd last one.
    fillers = [(scale * (-1) ** i).expand(-1, 1, *binary.signs.shape[2:]) for i in range(more)]
    weight = torch.cat([binary.signs * scale, *fillers], 1)
    call = module.graph.call_function
    with module.graph.inserting_before(conv):
        data = step.source
        if more:
            data = call(torch.ops.aten.constant_pad_nd.default, (data, [0, 0, 0, 0, 0, more], -1.0))
        filters = add_constant(module, "binary_weight", weight)
        options = (stride, padding, dilation, step.at_zero != -step.height, layer)
        result = call(torch.ops.hbnn_plugin.binary_conv2d.default, (data, filters, *options))
        if more % 2:
            ones = torch.ones(1, 1, *step.source.meta["val"].shape[2:], device=weight.device)
            rest = F.conv2d(ones, fillers[0], None, stride, padding, dilation)
            result = call(torch.ops.aten.add.Tensor, (result, add_constant(module, "odd_channel", rest)))
        zeros = bias in known and not known[bias].any()  # OpenVINO drops them, and the layer's name with them
        if bias is not None and not zeros:
            column = call(torch.ops.aten.view.default, (bias, [-1, 1, 1]))
            result = call(torch.ops.aten.add.Tensor, (result, column))
    result.meta = conv.meta
    conv.replace_all_uses_with(result)
    module.graph.erase_node(conv)
    return result
