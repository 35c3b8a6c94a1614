"""The operations of one forward pass, by layer: multiply-adds of real and of binary operands, elementwise ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..host.convolved import CONVOLUTIONS
from .running import follow

__all__ = ["Operations", "count_operations"]

_ELEMENTWISE: dict[Callable[..., Any], int] = {
    **dict.fromkeys((F.batch_norm, torch.batch_norm), 2),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), 1),
    **dict.fromkeys((F.relu6, F.hardtanh, F.hardtanh_), 1),
}
"""Operations an element of the output."""


class Operations(NamedTuple):
    """Of one layer."""

    multiply_adds: int = 0
    """Of real numbers; also those of binary weights with real inputs."""
    binary_multiply_adds: int = 0
    """Of binary weights with binary inputs."""
    elementwise: int = 0
    """2 an element for BatchNorm, 1 for ReLU and hardtanh."""


class _Counter(TorchFunctionMode):
    """Counts for the innermost module that is running. Multiply-adds are torch's flop counter's, halved."""

    def __init__(self, binary: Collection[str]) -> None:
        super().__init__()
        self.binary = binary
        self.flops = FlopCounterMode(display=False)
        self.counts: defaultdict[str, Operations] = defaultdict(Operations)
        self.running: list[str] = []

    @torch.no_grad()
    def run(self, model: nn.Module, x: Tensor) -> None:
        """Count one forward."""
        with follow(model) as self.running, self.flops, self:
            model(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        layer = self.running[-1] if self.running else ""  # the innermost; around the model's own forward the model
        binary = func in CONVOLUTIONS and layer in self.binary and _two_valued(args[0] if args else kwargs["input"])
        before = self.flops.get_total_flops()
        out = func(*args, **kwargs)
        new = (self.flops.get_total_flops() - before) // 2
        real, signs, others = self.counts[layer]
        others += _ELEMENTWISE[func] * out.numel() if func in _ELEMENTWISE else 0
        self.counts[layer] = Operations(real, signs + new, others) if binary else Operations(real + new, signs, others)
        return out


def count_operations(model: nn.Module, x: Tensor, binary: Collection[str]) -> dict[str, Operations]:
    """Module name → the operations of its own, without its children's, in one forward pass in the mode it is in.

    Args:
        model: is run once on ``x``; whatever its forward does to buffers stays done.
        x: with a batch dimension; values of no pattern, since a layer's input is binary where all that is not zero in
            it has one magnitude.
        binary: names of the layers with binary weights.
    """
    counter = _Counter(binary)
    counter.run(model, x)
    return {name: counts for name, counts in counter.counts.items() if any(counts)}


def _two_valued(x: Tensor) -> bool:
    """Signs, or 0 and 1, also of any one magnitude, and padded with zeros."""
    magnitudes = x.abs()
    largest = magnitudes.max()
    return bool(largest > 0) and bool(((magnitudes == 0) | (magnitudes == largest)).all())
