"""BinaryConnect: Training Deep Neural Networks with binary weights during propagations (NIPS 2015, arXiv:1511.00363).

1/32: weights are binary, activations stay real. The deterministic binarization:

    forward          sign(w)
    pseudo-gradient  1 for |w| <= 1, zero elsewhere

The authors pass the gradient on everywhere and clip w to [-1, 1] after each step. A host whose weight may be
parametrized cannot: the weight is then computed, and what is written into it is lost. The gradient that would carry a
weight further beyond ±1 is what the clip undoes, so here none passes there; unlike a clipped weight, such a one comes
back by weight decay and momentum alone. A scale there is none: BatchNorm follows. Nothing is scheduled.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, clipped_sign

__all__ = ["BinaryConv2d", "set_progress"]


class BinaryConv2d(BinaryConv):
    """BinaryConnect's convolution; see the module's docstring for forward and pseudo-gradient."""

    def binary_weight(self) -> Tensor:
        return clipped_sign(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.binary_weight(), self.bias, self.stride, self.padding)


def set_progress(model: nn.Module, progress: float) -> None:
    """Nothing: the estimator stays what it is."""
