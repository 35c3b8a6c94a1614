"""complexity: what a model costs in bytes and operations, by the convention of [HBNN] Table IV and as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diagnostics.tables import ByLayer, table
from ..host.selection import own_class
from .capture import BinaryWeight, cluster_settings, plain_copy, seen_weights
from .operations import Operations, count_operations

__all__ = ["Complexity", "Cost", "LayerComplexity", "complexity"]

WORD = 64
"""Binary multiply-adds in one operation ([HBNN] Table IV): XNOR and popcount work on words of 64 bits."""


class LayerComplexity(NamedTuple):
    """One module's own parameters, buffers and operations, without its children's. Tied tensors count once.

    Attributes:
        kind: name of its class.
        parameters: how many.
        bits: of one weight as stored: 1 for a binary weight. 0 without parameters.
        bytes: of its parameters and buffers, as a packed file stores them.
        multiply_adds: of real operands; a binary weight's with real inputs too.
        binary_multiply_adds: of binary weights with binary inputs.
        elementwise: 2 an element for BatchNorm, 1 for ReLU and hardtanh.
    """

    kind: str
    parameters: int
    bits: int
    bytes: int
    multiply_adds: int
    binary_multiply_adds: int
    elementwise: int


class Cost(NamedTuple):
    """A model's size and work.

    Attributes:
        megabytes: of 10⁶ bytes.
        ops: multiply-adds, or what counts as one.
    """

    megabytes: float
    ops: float


class Complexity(ByLayer[LayerComplexity]):
    """Layer name → :class:`LayerComplexity`. Its repr is a table.

    Attributes:
        paper: by the convention of [HBNN] Table IV. Of a model with binary layers: weights and biases of the layers
            that multiply, one bit a binary weight, four bytes any other, without BatchNorm and scales; their
            multiply-adds, the binary ones divided by 64. Of a model without: all parameters, at four bytes;
            multiply-adds, 2 an element for BatchNorm, 1 for ReLU.
        total: all parameters and buffers as a packed file stores them, without names and header; all operations that
            the table has, the binary ones divided by 64. Signs, pooling, the additions of shortcuts, and scales
            (which BatchNorm takes in) are no operations here.
        notes: layer name → why it counts as real-valued, of each that should be binary: it has a cluster, or is of a
            class of its own.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerComplexity],
        paper: Cost,
        total: Cost,
        input_shape: Sequence[int],
        notes: Mapping[str, str],
    ) -> None:
        super().__init__(layers)
        self.paper = paper
        self.total = total
        self.input_shape = tuple(input_shape)
        self.notes = dict(notes)

    def __repr__(self) -> str:
        header = ("layer", "kind", "parameters", "bits", "bytes", "multiply-adds", "binary", "elementwise")
        rows = [(name, layer.kind, *map(str, layer[1:])) for name, layer in self.items()]
        figures: list[tuple[int, ...]] = [layer[1:] for layer in self.values()]
        parameters, _, *rest = (str(sum(column)) for column in zip(*(figures or [(0,) * (len(header) - 2)])))
        rows.append(("sum", "", parameters, "", *rest))
        costs = [
            f"{title}: {cost.megabytes:.4g} MB, {cost.ops:.4g} operations"
            for title, cost in (("by the paper's convention", self.paper), ("in total", self.total))
        ]
        notes = [f"{name} counts as real-valued: {why}" for name, why in self.notes.items()]
        return "\n".join([table(f"one input of shape {self.input_shape}", header, rows), *costs, *notes])


def complexity(model: nn.Module, input_shape: Sequence[int] | Tensor) -> Complexity:
    """Parameters, bits, bytes and operations of a model, by layer and in total, at inference.

    A copy of the model, fused where it was applied, is run once in evaluation mode on one random input; the model
    itself, its mode and the random state stay as they are. Which layers are binary, in weights and in inputs, is what
    this run shows.

    Args:
        model: applied, fused, plain or full-precision; on any device.
        input_shape: of one input without the batch dimension, such as ``(3, 224, 224)``; or an example, a batch of one,
            where the model takes something else than floats (tokens).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model does not run on such an input; an example is a batch of several.
    """
    if isinstance(input_shape, Tensor) and (input_shape.ndim == 0 or len(input_shape) != 1):
        raise ValueError(f"the example has the shape {tuple(input_shape.shape)}; give a batch of one, such as x[:1]")
    plain = plain_copy(model)
    seen_layers = dict(seen_weights(plain, also=cluster_settings(model)))
    binary = {name: seen for name, seen in seen_layers.items() if isinstance(seen, BinaryWeight)}
    notes = {name: seen for name, seen in seen_layers.items() if isinstance(seen, str)}
    like = next((p for p in plain.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    if isinstance(input_shape, Tensor):
        x = input_shape.to(like.device)
    else:
        x = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        try:
            operations = count_operations(plain, x, binary)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} does not run on one input of shape {tuple(x.shape[1:])} (a batch dimension is "
                f"put in front): {error}"
            ) from error
    layers = _layers(plain, binary, operations)
    total = Cost(
        sum(layer.bytes for layer in layers.values()) / 1e6,
        sum(ops.multiply_adds + ops.elementwise + ops.binary_multiply_adds / WORD for ops in operations.values()),
    )
    return Complexity(layers, _paper(plain, binary, operations), total, x.shape[1:], notes)


def _layers(
    plain: nn.Module, binary: Mapping[str, BinaryWeight], operations: Mapping[str, Operations]
) -> dict[str, LayerComplexity]:
    layers: dict[str, LayerComplexity] = {}
    seen: set[int] = set()
    for name, module in plain.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        buffers = [
            b for n, b in module._buffers.items() if b is not None and n not in module._non_persistent_buffers_set
        ]
        new = [t for t in (*parameters, *buffers) if id(t) not in seen]
        seen.update(map(id, new))
        if not new and name not in operations:
            continue
        weight = binary[name].layer.weight if name in binary else None
        sizes = [_packed_bytes(binary[name]) if t is weight else t.numel() * t.element_size() for t in new]
        layers[name or type(plain).__name__] = LayerComplexity(
            own_class(module).__name__,
            sum(t.numel() for t in new if isinstance(t, nn.Parameter)),
            1 if name in binary else 8 * max((p.element_size() for p in parameters), default=0),
            sum(sizes),
            *operations.get(name, Operations()),
        )
    return layers


def _packed_bytes(weight: BinaryWeight) -> int:
    scale = weight.scale
    different = bool((scale != scale[0]).any())
    return math.ceil(weight.bits.numel() / 8) + (scale.numel() * scale.element_size() if different else 0)


def _paper(plain: nn.Module, binary: Mapping[str, BinaryWeight], operations: Mapping[str, Operations]) -> Cost:
    if not binary:
        ops = sum(own.multiply_adds + own.elementwise for own in operations.values())
        return Cost(4 * sum(p.numel() for p in plain.parameters()) / 1e6, ops)
    multiplying = [plain.get_submodule(n) for n, own in operations.items() if own.multiply_adds and n not in binary]
    floats: dict[int, Tensor] = {id(p): p for module in multiplying for p in module.parameters(recurse=False)}
    biases = [getattr(seen.layer.module, "bias", None) for seen in binary.values()]
    floats |= {id(bias): bias for bias in biases if isinstance(bias, Tensor)}
    weights = [seen.layer.module._parameters.get(seen.layer.tensor_name) for seen in binary.values()]
    bits = sum(p.numel() for p in {id(p): p for p in weights if p is not None}.values())
    megabytes = (4 * sum(p.numel() for p in floats.values()) + bits / 8) / 1e6
    return Cost(megabytes, sum(own.multiply_adds + own.binary_multiply_adds / WORD for own in operations.values()))
