"""The plain sign network, 1/1: the binary weight of XNOR-Net (ECCV 2016, arXiv:1603.05279), Eqs. 2-4 of the HBNN paper.

Weights, with α = mean|w| of a filter:

    forward          ŵ = sign(w) · α
    pseudo-gradient  through sign 1 for |w| <= 1, zero elsewhere; through α none

Activations:

    forward          sign(a)
    pseudo-gradient  1 for |a| <= 1, zero elsewhere

XNOR-Net's own gradient has ∂L/∂ŵ / n as another summand, n the weights of a filter, since α is a function of w too; and
its output is scaled by the magnitudes of the input. Nothing is scheduled.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, clipped_sign

__all__ = ["BinaryConv2d", "set_progress"]


class BinaryConv2d(BinaryConv):
    """A plain sign convolution; see the module's docstring for forward and pseudo-gradient."""

    def binary_weight(self) -> Tensor:
        scale = self.weight.detach().abs().mean((1, 2, 3), keepdim=True)
        return clipped_sign(self.weight) * scale

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(clipped_sign(x), self.binary_weight(), self.bias, self.stride, self.padding)


def set_progress(model: nn.Module, progress: float) -> None:
    """Nothing: the estimator stays what it is."""
