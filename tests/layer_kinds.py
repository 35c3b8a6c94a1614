"""Binary layers of every kind and shape, and a network whose layers share a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_hosts import HardBinaryConv, HostConv, ScaledConv, ste_sign


def tied_net(host: type[HostConv]) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), host(4, 4, 3, padding=1), host(4, 4, 3, padding=1, bias=False), host(4, 4, 3, padding=1)
    )
    net[2].weight = net[1].weight
    return nn.Sequential(net, nn.Flatten(), nn.LazyLinear(4))


class SignLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.detach().abs().mean(1, keepdim=True) * ste_sign(self.weight), self.bias)


class SignConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, self.weight.detach().abs().mean((1, 2), keepdim=True) * ste_sign(self.weight), self.bias
        )


class SignConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, ste_sign(self.weight), self.bias)


class SignTransposed(nn.ConvTranspose2d):
    """Scaled for each output channel."""

    def forward(self, x: Tensor) -> Tensor:
        by_group = self.weight.unflatten(0, (self.groups, -1))
        scale = by_group.detach().abs().mean((1, 3, 4), keepdim=True)
        w = (scale * ste_sign(by_group)).flatten(0, 1)
        return F.conv_transpose2d(x, w, self.bias, self.stride, self.padding, 0, self.groups)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: SignLinear(6, 4), (2, 6), 4),
    "1-D": (lambda: SignConv1d(4, 6, 3), (2, 4, 7), 6),
    "1-D dilated": (lambda: SignConv1d(4, 6, 3, dilation=2), (2, 4, 9), 6),
    "3-D": (lambda: SignConv3d(2, 3, 2), (2, 2, 4, 4, 4), 3),
    "grouped": (lambda: ScaledConv(4, 6, 3, groups=2), (2, 4, 5, 5), 6),
    "depthwise": (lambda: ScaledConv(4, 4, 3, groups=4), (2, 4, 5, 5), 4),
    "pointwise": (lambda: ScaledConv(4, 6, 1), (2, 4, 5, 5), 6),
    "reflected": (lambda: ScaledConv(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5), 6),
    "flat": (lambda: HardBinaryConv(4, 6), (2, 4, 5, 5), 6),
    "transposed": (lambda: SignTransposed(4, 6, 3), (2, 4, 5, 5), 6),
    "transposed, grouped": (lambda: SignTransposed(4, 6, 3, groups=2), (2, 4, 5, 5), 6),
}
