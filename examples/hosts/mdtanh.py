"""MD-tanh-s: Mirror Descent View for Neural Network Quantization (AISTATS 2021, arXiv:1910.08237).

1/32: weights become binary in the course of training, activations stay real. The latent weight w is the dual variable
of mirror descent under the tanh mirror map, and the network sees the primal one:

    forward          tanh(β·w) in training, sign(w) in evaluation;   β = 10⁴^progress
    pseudo-gradient  the identity: w ← w - η ∂L/∂tanh(β·w) is the mirror descent step in the dual

Theirs: the "-s", numerically stable, form keeps w itself and projects it in every forward; β grows by a constant factor
at regular intervals from 1; every evaluation rounds, also those during training; no weight decay. In their scripts for
CIFAR-10 β ends at 1.02^500 = 2·10⁴ (ResNet-18) or 1.2^50 = 9·10³ (VGG-16), hence our end of 10⁴: there
|tanh(β·w)| > 0.99 for all but 0.3 % of the weights of a ResNet-8 after 12 epochs.

Our reading: β moves once an epoch, sign(0) = +1, and the first and the last layer stay real. Theirs projects all
parameters and is trained by Adam. While β is small the running statistics of BatchNorm belong to weights far from ±1,
so accuracies before about the middle of training say little.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, sign

__all__ = ["BinaryConv2d", "set_progress"]

BETA_END = 1e4


class BinaryConv2d(BinaryConv):
    """MD-tanh-s's convolution; see the module's docstring for forward and pseudo-gradient. ``beta`` is a buffer."""

    beta: Tensor

    def add_state(self) -> None:
        self.register_buffer("beta", torch.tensor(1.0))

    def binary_weight(self) -> Tensor:
        """The tensor that forward convolves with: tanh(β·w), of many values, in training; sign(w) in evaluation."""
        latent = self.weight.detach()
        primal = (self.beta * latent).tanh() if self.training else sign(latent)
        # weight - latent is an exact zero: only the gradient of an identity stays.
        return primal + (self.weight - latent)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.binary_weight(), self.bias, self.stride, self.padding)


def set_progress(model: nn.Module, progress: float) -> None:
    """Raise β from 1 to 10⁴ exponentially."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.beta.fill_(BETA_END**progress)
