"""Flip ratios: how many binary weights differ from what they were at the reference time ([HBNN] Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..cluster.epc import applied_layers
from ..cluster.reference import current_bits
from ..host.bits import pack_bits, unpack_bits
from .tables import ByLayer, table

__all__ = ["FlipRatio", "flip_ratio"]


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
