"""IR-Net: Forward and Backward Information Retention for Accurate Binary Neural Networks (CVPR 2020, arXiv:1909.10788).

Libra parameter binarization, on each filter of the latent weight w:

    forward          ŵ = (w - mean(w)) / std(w),   binary weight = sign(ŵ) · 2^s,   s = round(log2(mean|ŵ|))
    pseudo-gradient  through s none, through sign the error decay estimator below, through ŵ the exact one

Error decay estimator, for weights and activations alike:

    forward          sign(x)
    pseudo-gradient  k·t·(1 - tanh²(t·x)),   t = t_min · (t_max / t_min)^progress,   k = max(1/t, 1)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, centre, sign, variance

__all__ = ["BinaryConv2d", "set_progress"]

T_MIN = 1e-3
T_MAX = 1e1


class _DecaySign(torch.autograd.Function):
    """Sign, with the error decay estimator for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(x, k, t)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, k, t = ctx.saved_tensors
        # tanh_backward(g, y) = g (1 - y²) in a single pass over memory.
        return torch.ops.aten.tanh_backward(grad, (x * t).tanh_()).mul_(k * t), None, None


class BinaryConv2d(BinaryConv):
    """IR-Net's convolution; see the module's docstring for forward and pseudo-gradient.

    The estimator's ``k`` and ``t`` are buffers, so that checkpoints hold them.
    """

    k: Tensor
    t: Tensor

    def add_state(self) -> None:
        self.register_buffer("k", torch.tensor(1 / T_MIN))
        self.register_buffer("t", torch.tensor(T_MIN))

    def binary_weight(self) -> Tensor:
        centred = centre(self.weight)
        standard = centred / variance(centred).sqrt()
        shift = standard.detach().abs().mean((1, 2, 3), keepdim=True).log2().round()
        binary: Tensor = _DecaySign.apply(standard, self.k, self.t)  # type: ignore[no-untyped-call]
        return binary * shift.exp2()

    def forward(self, x: Tensor) -> Tensor:
        binary_x = _DecaySign.apply(x, self.k, self.t)  # type: ignore[no-untyped-call]
        return F.conv2d(binary_x, self.binary_weight(), self.bias, self.stride, self.padding)


def set_progress(model: nn.Module, progress: float, t_min: float = T_MIN) -> None:
    """Sharpen the estimator from almost an identity (t = t_min) to almost a sign (t = 10)."""
    t = t_min * (T_MAX / t_min) ** progress
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.t.fill_(t)
            module.k.fill_(max(1 / t, 1.0))
