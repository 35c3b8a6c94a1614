"""Flip ratios: how many binary weights differ from what they were at the reference time ([HBNN] Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..cluster.epc import EPC, find
from ..host.convolved import binary_value, convolved_weight, pack_bits, unpack_bits
from ..host.selection import own_class
from .tables import ByLayer, table

__all__ = ["FlipRatio", "applied_layers", "binary_bits", "current_bits", "flip_ratio", "set_reference"]


class FlipRatio(ByLayer[float]):
    """Layer name → flip ratio, a share of the layer's weights from 0 to 1. Its repr is a table."""

    def __init__(self, flips: Mapping[str, int], weights: Mapping[str, int]) -> None:
        super().__init__({layer: flips[layer] / weights[layer] for layer in flips})
        self.flips = dict(flips)
        self.weights = dict(weights)

    @property
    def total(self) -> float:
        """The flip ratio over the weights of all layers together."""
        return sum(self.flips.values()) / sum(self.weights.values())

    def __repr__(self) -> str:
        rows = [(name, str(self.weights[name]), str(self.flips[name]), f"{100 * self[name]:.2f} %") for name in self]
        rows.append(
            ("total", str(sum(self.weights.values())), str(sum(self.flips.values())), f"{100 * self.total:.2f} %")
        )
        return table("flip ratio since the reference", ("layer", "weights", "flips", "ratio"), rows)


def applied_layers(model: nn.Module) -> dict[str, tuple[nn.Module, str, EPC]]:
    """Layer name → (module, tensor name, cluster) of an applied model. Raises ValueError if there is none."""
    found: dict[str, tuple[nn.Module, str, EPC]] = {}
    for name, module in model.named_modules():
        clusters = find(module)
        for tensor_name, epc in clusters.items():
            label = name or own_class(module).__name__
            found[label if len(clusters) == 1 else f"{label}.{tensor_name}"] = (module, tensor_name, epc)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no exponential parametrization: call hbnn_plugin.apply(model) first"
        )
    return found


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


def flip_ratio(model: nn.Module, *, reset: bool = False) -> FlipRatio:
    """The share of each layer's binary weights that differ from what they were at the reference time.

    The reference time is :func:`hbnn_plugin.apply`, or the last call with ``reset=True``; it is kept in the model's
    state_dict, one bit a weight. A binary weight is what the host's forward convolves with.

    Args:
        model: a model that apply was called on, also inside DistributedDataParallel.
        reset: make now the new reference time, after counting.

    Raises:
        ValueError: the model was never applied, or is fused.
    """
    flips: dict[str, int] = {}
    weights: dict[str, int] = {}
    for name, (module, tensor_name, epc) in applied_layers(model).items():
        bits = current_bits(module, tensor_name, epc)
        flips[name] = int((bits != unpack_bits(epc.flip_reference, bits.numel())).sum())
        weights[name] = bits.numel()
        if reset:
            epc.flip_reference = pack_bits(bits)
    return FlipRatio(flips, weights)
