"""A binary layer for OpenVINO, and what came of it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hbnn_plugin.export import to_openvino
from hbnn_plugin.export.openvino_model import XnorModel


def export(model: nn.Module, x: Tensor, **options: Any) -> XnorModel:
    return to_openvino(model, x, threads=1, **options)


def binary(xnor: XnorModel) -> list[bool]:
    return [layer.binary for layer in xnor.layers]


def whole_numbers(*shape: int, zeros: bool = True) -> Tensor:
    """−1, 1, and many zeros."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-1, 2, shape, generator=generator).float()
    return drawn if zeros else drawn + 0.5


def plus_at_zero(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def minus_at_zero(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) * 2 - 1


class Layer(nn.Module):
    """One convolution of signs with ±2ⁱ, so that its sums are exact."""

    def __init__(self, sign: Callable[[Tensor], Tensor], inputs: int = 8, outputs: int = 3, **options: Any) -> None:
        super().__init__()
        self.sign = sign
        self.conv = nn.Conv2d(inputs, outputs, **{"kernel_size": 3, "padding": 1, **options})
        with torch.no_grad():
            scales = 2.0 ** torch.arange(outputs).view(-1, 1, 1, 1)
            self.conv.weight.copy_(plus_at_zero(self.conv.weight) * scales)
            if self.conv.bias is not None:
                self.conv.bias.mul_(8).round_()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.sign(x))


def clipped(x: Tensor) -> Tensor:
    x = x.clamp(-1, 1)
    return x + (plus_at_zero(x) - x).detach()
