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
        self._settled = 0

    @torch.no_grad()
    def run(self, model: nn.Module, x: Tensor) -> None:
        """Count one forward."""
        with follow(model, between=self._settle) as self.running, self.flops, self:
            model(x)
            self._settle()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        binary = func in CONVOLUTIONS and self.innermost in self.binary
        binary = binary and _two_valued(args[0] if args else kwargs["input"])
        if binary:
            self._settle()
        out = func(*args, **kwargs)
        if binary:
            self._settle(binary=True)
        elif func in _ELEMENTWISE:
            self._add(elementwise=_ELEMENTWISE[func] * out.numel())
        return out

    @property
    def innermost(self) -> str:
        """The module that is running; around the model's own forward it is the model."""
        return self.running[-1] if self.running else ""

    def _settle(self, binary: bool = False) -> None:
        """Put what has run since the last time on the account of the module that was running."""
        total = self.flops.get_total_flops()
        new, self._settled = (total - self._settled) // 2, total
        if binary:
            self._add(binary_multiply_adds=new)
        else:
            self._add(multiply_adds=new)

    def _add(self, **new: int) -> None:
        before = self.counts[self.innermost]
        self.counts[self.innermost] = before._replace(**{k: getattr(before, k) + n for k, n in new.items()})


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
