"""SiMaN: Sign-to-Magnitude Network Binarization (TPAMI 2022, arXiv:2102.07981).

The binary weight is found from the magnitudes: the angle between latent and binary weight is smallest when the larger
half of a filter's |w| becomes 1 and the rest 0. As deployed, b in {0, 1} is stored and 2b - 1 is convolved with:

    forward          w' = clip(w - mean(w)),   ŵ = (w' - mean(w')) / √(var(w') + ε),
                     b = 1 where |ŵ| is above the filter's median, 0 elsewhere,   binary weight = 2b - 1
    pseudo-gradient  that of |ŵ|; identity through the clip

The clip keeps magnitudes between the layer's P-th and (100 - P)-th percentile, P falling from 15 to 0. The authors'
code writes the clipped weight back into the parameter in every forward. Here it stays a function of the latent weight,
with the identity as its gradient: the latent is moved by the optimizer alone, and the weight may be parametrized.

Activations are standardized over each sample, then

    forward          sign(a)
    pseudo-gradient  2 - |2a| for |a| < 1, zero elsewhere

The output is multiplied by a learned scale a channel, which starts at mean|w|. No weight decay acts on the latent
weights: it would hold them at a Laplacian and bar the maximal entropy of the binary values. (The authors' code exempts
the learned scales too; here they decay, in front of a BatchNorm, which undoes it.) The authors freeze b in evaluation;
here it is recomputed, and so always belongs to the weights as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv, QuadraticSign, centre, variance

__all__ = ["BinaryConv2d", "set_progress"]

PERCENT_START = 15.0
EPS = 1e-5


# An operator of its own, since torch.compile would end a graph at ``item``: the network trains in half the time.
@torch.library.custom_op(
    "hbnn_examples::quantiles", mutates_args=(), schema="(Tensor magnitude, Tensor percent) -> (Tensor, Tensor)"
)
def _quantiles(magnitude: Tensor, percent: Tensor) -> tuple[Tensor, Tensor]:
    """Below the first lie ``percent`` of the numbers, above the second as many."""
    values = magnitude.flatten()
    outside = round(percent.item() / 100 * (len(values) - 1))
    # kthvalue selects where torch.quantile sorts: four times faster on the largest layers.
    return values.kthvalue(1 + outside).values, values.kthvalue(len(values) - outside).values


@_quantiles.register_fake
def _(magnitude: Tensor, percent: Tensor) -> tuple[Tensor, Tensor]:
    return magnitude.new_empty(()), magnitude.new_empty(())


class BinaryConv2d(BinaryConv):
    """SiMaN's convolution; see the module's docstring for forward and pseudo-gradient. ``percent`` is a buffer."""

    percent: Tensor

    def add_state(self) -> None:
        self.scale = nn.Parameter(torch.empty(self.out_channels, 1, 1))
        self.register_buffer("percent", torch.tensor(PERCENT_START))
        self.weight_drawn()

    @torch.no_grad()
    def weight_drawn(self) -> None:
        self.scale.copy_(self.weight.abs().mean((1, 2, 3)).view(-1, 1, 1))

    def binary_weight(self) -> Tensor:
        weight = centre(self.weight)
        weight = centre(weight + (self._clip(weight.detach()) - weight.detach()))
        magnitude = (weight * (variance(weight) + EPS).rsqrt()).abs()
        rows = magnitude.detach().flatten(1)
        larger = (rows > rows.median(dim=1, keepdim=True).values).view(magnitude.shape)
        split = torch.where(larger, 1.0, -1.0).to(magnitude)
        # magnitude - magnitude is an exact zero: only its gradient stays.
        return split + (magnitude - magnitude.detach())

    def _clip(self, weight: Tensor) -> Tensor:
        magnitude = weight.abs()
        low, high = _quantiles(magnitude, self.percent)
        return magnitude.clamp(low, high).copysign(weight)

    def forward(self, x: Tensor) -> Tensor:
        # One group is one sample: group_norm standardizes it, in one pass and in any memory format.
        binary_x = QuadraticSign.apply(F.group_norm(x, 1, eps=EPS))  # type: ignore[no-untyped-call]
        return F.conv2d(binary_x, self.binary_weight(), self.bias, self.stride, self.padding) * self.scale


def set_progress(model: nn.Module, progress: float) -> None:
    """Lower the percentile at which weights are clipped from 15 to 0."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.percent.fill_(PERCENT_START * (1 - progress))
