"""ReCU: Reviving the Dead Weights in Binary Neural Networks (ICCV 2021, arXiv:2103.12369).

Weights, with σ the standard deviation of a filter:

    forward          ŵ = (w - mean(w)) · 2√2 / σ,   Q = -mean|ŵ| · ln(2 - 2τ) once a layer,
                     binary weight = sign(clamp(ŵ, -Q, Q))
    pseudo-gradient  identity through sign, none where |ŵ| > Q, none through Q, the exact one through ŵ

Activations (Eq. 4), divided by the standard deviation of the sample; in training only, since it changes no sign:

    forward          sign(a)
    pseudo-gradient  2 - |2a| for |a| < 1, zero elsewhere

The output is multiplied by a learned scale a channel, which starts uniformly in [0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, QuadraticSign, centre, sign, variance

__all__ = ["BinaryConv2d", "set_progress"]

TAU_MIN = 0.85
TAU_MAX = 0.99
EPS = 1e-5


class BinaryConv2d(BinaryConv):
    """ReCU's convolution; see the module's docstring for forward and pseudo-gradient. ``tau`` is a buffer."""

    tau: Tensor

    def add_state(self) -> None:
        self.scale = nn.Parameter(torch.rand(self.out_channels, 1, 1))
        self.register_buffer("tau", torch.tensor(TAU_MIN))

    def binary_weight(self) -> Tensor:
        centred = centre(self.weight)
        standard = centred * (math.sqrt(8) * (variance(centred) + EPS).rsqrt())
        quantile = -standard.detach().abs().mean() * torch.log(2 - 2 * self.tau)
        revived = standard.clamp(-quantile, quantile)
        # revived - revived is an exact zero: only the gradient of an identity stays.
        return sign(revived.detach()) + (revived - revived.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (variance(centre(x)) + EPS).rsqrt()
        binary_x = QuadraticSign.apply(x)  # type: ignore[no-untyped-call]
        return F.conv2d(binary_x, self.binary_weight(), self.bias, self.stride, self.padding) * self.scale


def set_progress(model: nn.Module, progress: float) -> None:
    """Raise τ from 0.85 to 0.99 exponentially: weights first, entropy later."""
    tau = TAU_MIN + (TAU_MAX - TAU_MIN) * math.expm1(progress) / math.expm1(1)
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.tau.fill_(tau)
