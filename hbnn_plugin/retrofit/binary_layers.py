r"""Binary convolutions for a full-precision model of the user's own (``apply(model, binarize=...)``).

Forward (weights, [HBNN] Eqs. 2 and 3):  w_b = α sign(w), α = mean|w| per filter, without gradient.
Forward (activations, "1/1"):            a_b = sign(a).
Backward (Eq. 4):                        ∂L/∂w = ∂L/∂w_b·α·1[|w| ≤ 1],  ∂L/∂a = ∂L/∂a_b·1[|a| ≤ 1].

sign(0) = +1 throughout.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..geometry.looking import traced

__all__ = ["BinaryConv2d", "Sign", "SignConv2d", "sign"]


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0].abs() <= 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        masked: Tensor = grad * inside
        return masked

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any], x: Tensor) -> Any:
        return sign(x), in_dims[0]


def sign(x: Tensor) -> Tensor:
    """sign(x) with sign(0) = +1; straight-through gradient 1[|x| ≤ 1] ([HBNN] Eq. 4). Shape and dtype of x."""
    if traced():  # the same in plain ops, which compilers fuse
        clipped = x.clamp(-1, 1)
        return clipped + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - clipped).detach()
    result: Tensor = _StraightThroughSign.apply(x)  # type: ignore[no-untyped-call]
    return result


class Sign(nn.Module):
    """:func:`sign` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return sign(x)


class BinaryConv2d(nn.Conv2d):
    """nn.Conv2d with weight α sign(w), and sign activations if ``sign_input`` is not None. Keys as nn.Conv2d's."""

    sign_input: Sign | None

    @classmethod
    def convert(cls, conv: nn.Conv2d, binarize: str) -> None:
        """Make ``conv`` one of these: the very module, which the model may also hold where nobody can look."""
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.sign_input = Sign() if binarize == "1/1" else None
        conv._warned = False

    def binary_weight(self) -> Tensor:
        """α sign(w), of the weight's shape and dtype."""
        weight = self.weight
        scale = weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
        return scale * sign(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, as nn.Conv2d shapes it."""
        if self.sign_input is not None:
            if self.training and torch.is_grad_enabled() and not self._warned and not traced():
                self._check_input(x)
            x = self.sign_input(x)
        result: Tensor = self._conv_forward(x, self.binary_weight(), self.bias)
        return result

    def _check_input(self, x: Tensor) -> None:
        self._warned = True
        if x.numel() and bool((x >= 0).all()):
            warnings.warn(
                "a binarized convolution's input is never negative, so every activation becomes +1: is there a "
                "functional relu in front of it? binarize='1/1' replaces nn.ReLU modules only: use nn.Hardtanh().",
                stacklevel=4,
            )


class SignConv2d(nn.Conv2d):
    """A fused 1/1 layer: nn.Conv2d whose weight is ±scale, behind the sign of its input."""

    sign_input: Sign
    is_fused: ClassVar = True
    """Its weight is binary for good: no layer for :func:`hbnn_plugin.apply`."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of sign(x)."""
        return super().forward(self.sign_input(x))
