"""The binary weight of a layer, and the one that its flips are counted from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..host.bits import binary_value, pack_bits
from ..host.convolved import convolved_weight
from .epc import EPC

__all__ = ["binary_bits", "current_bits", "set_reference"]


def current_bits(module: nn.Module, tensor_name: str, epc: EPC) -> Tensor:
    """The layer's binary weight now, one bool a weight, on the CPU: what its forward convolves with, else its sign."""
    with torch.no_grad():
        weight: Tensor = getattr(module, tensor_name)
    return binary_bits(weight, convolved_weight(module, epc.shape, weight), epc.shape, epc.unit_dims)


def binary_bits(weight: Tensor, convolved: Tensor | None, shape: tuple[int, ...], unit_dims: tuple[int, ...]) -> Tensor:
    """One bool a weight, on the CPU: the upper of the two convolved values, else the weight's sign."""
    bits = weight.detach() > 0 if convolved is None else binary_value(convolved.reshape(shape), unit_dims)
    return bits.flatten().cpu()


def set_reference(module: nn.Module, tensor_name: str, epc: EPC) -> None:
    """Count flips of this layer from its binary weight as it is now."""
    epc.flip_reference = pack_bits(current_bits(module, tensor_name, epc))
