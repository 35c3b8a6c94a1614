"""The operations of one forward pass, by layer: multiply-adds of real and of binary operands, elementwise ones."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .convolved import CONVOLUTIONS

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

    def __init__(self, model: nn.Module, binary: Collection[str]) -> None:
        super().__init__()
        self.model = model
        self.binary = binary
        self.flops = FlopCounterMode(display=False)
        self.counts: defaultdict[str, Operations] = defaultdict(Operations)
        self._running: list[str] = [""]
        self._settled = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave()))
        try:
            with torch.no_grad(), self.flops, self:
                yield
            self._settle()
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        binary = func in CONVOLUTIONS and self._running[-1] in self.binary
        binary = binary and _two_valued(args[0] if args else kwargs["input"])
        if binary:
            self._settle()
        out = func(*args, **kwargs)
        if binary:
            self._settle(binary=True)
        elif func in _ELEMENTWISE:
            self._add(elementwise=_ELEMENTWISE[func] * out.numel())
        return out

    def _enter(self, name: str) -> None:
        self._settle()
        self._running.append(name)

    def _leave(self) -> None:
        self._settle()
        self._running.pop()

    def _settle(self, binary: bool = False) -> None:
        """Put what has run since the last time on the account of the module that was running."""
        total = self.flops.get_total_flops()
        new, self._settled = (total - self._settled) // 2, total
        if binary:
            self._add(binary_multiply_adds=new)
        else:
            self._add(multiply_adds=new)

    def _add(self, **new: int) -> None:
        before = self.counts[self._running[-1]]
        self.counts[self._running[-1]] = before._replace(**{k: getattr(before, k) + n for k, n in new.items()})


def count_operations(model: nn.Module, x: Tensor, binary: Collection[str]) -> dict[str, Operations]:
    """Module name → the operations of its own, without its children's, in one forward pass in the mode it is in.

    Args:
        model: is run once on ``x``; whatever its forward does to buffers stays done.
        x: with a batch dimension; values of no pattern, since a layer's input is binary where all that is not zero in
            it has one magnitude.
        binary: names of the layers with binary weights.
    """
    counter = _Counter(model, binary)
    with counter.counting():
        model(x)
    return {name: counts for name, counts in counter.counts.items() if any(counts)}


def _two_valued(x: Tensor) -> bool:
    """Signs, or 0 and 1, also of any one magnitude, and padded with zeros."""
    magnitudes = x.abs()
    largest = magnitudes.max()
    return bool(largest > 0) and bool(((magnitudes == 0) | (magnitudes == largest)).all())
