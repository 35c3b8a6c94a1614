"""What the hosts share: the two-valued sign and two estimators of its gradient, per-filter statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BinaryConv",
    "BinaryConvClass",
    "QuadraticSign",
    "binary_layers",
    "centre",
    "clipped_sign",
    "sign",
    "variance",
]

_ALL_BUT_FIRST = (1, 2, 3)


class BinaryConvClass(Protocol):
    """A binary convolution as the networks construct it."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> nn.Module: ...


class BinaryConv(nn.Conv2d, ABC):
    """Base of the hosts' convolutions: the common constructor and the promise of `binary_weight`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        self.add_state()

    def add_state(self) -> None:
        """Register what the host keeps beside its weight: nothing, if it does not say otherwise."""

    def weight_drawn(self) -> None:
        """A network has drawn the weight: set what starts from it."""

    @abstractmethod
    def binary_weight(self) -> Tensor:
        """The tensor that forward convolves with: two values a filter, at the latest in evaluation."""


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryConv]]:
    """Every binary convolution of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv):
            yield name, module


def sign(x: Tensor) -> Tensor:
    """+1 for x >= 0 and -1 below. Unlike ``torch.sign`` it has no third value."""
    return x.sign().add_(0.5).sign_()


def centre(x: Tensor) -> Tensor:
    """Subtract the mean of each filter (or of each sample)."""
    return x - x.mean(_ALL_BUT_FIRST, keepdim=True)


def variance(centred: Tensor) -> Tensor:
    """Unbiased variance of each filter (or sample) of a centred tensor; on CPU far faster than ``Tensor.var``."""
    total: Tensor = centred.square().sum(_ALL_BUT_FIRST, keepdim=True)
    return total / (centred[0].numel() - 1)


class QuadraticSign(torch.autograd.Function):
    """Sign with the piecewise quadratic estimator (Bi-Real Net, arXiv:1808.00278).

    Forward: sign(x). Pseudo-gradient: 2 - 2|x| for |x| < 1, zero elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = x.abs().mul_(-2).add_(2).clamp_(min=0)
        return slope.mul_(grad)


class _ClippedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # 1 for |x| <= 1, else 0. A comparison would be kept as bools by torch.compile, whose code for them is slow.
        inside: Tensor = (2 - x.abs()).floor_().clamp_(0, 1)
        return inside.mul_(grad)


def clipped_sign(x: Tensor) -> Tensor:
    """Sign with the clipped straight-through estimator: the gradient passes where |x| <= 1."""
    result: Tensor = _ClippedSign.apply(x)  # type: ignore[no-untyped-call]
    return result
