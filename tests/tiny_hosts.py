"""Tiny binary networks that the tests put clusters on. None of them knows about hbnn_plugin."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbnn_plugin.cluster.epc import EPC, find
from hbnn_plugin.cluster.inplace import InPlace


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, latent: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Tensor, latent: Tensor) -> Tensor:
    """``value`` to the last bit, with the identity as its gradient to ``latent``."""
    result: Tensor = _StraightThrough.apply(value.detach(), latent)
    return result


def ste_sign(x: Tensor) -> Tensor:
    """Straight-through sign, sign(0) = +1."""
    return straight_through(torch.where(x >= 0, 1.0, -1.0).to(x.dtype), x)


def standardized(w: Tensor, eps: float = 0.0) -> Tensor:
    """Each filter without its mean, at unit variance."""
    rest = tuple(range(1, w.ndim))
    return (w - w.mean(rest, keepdim=True)) / (w.std(rest, keepdim=True) + eps)


class HostConv(nn.Conv2d):
    """A convolution with ``binary_weight()`` in the place of its weight."""

    def binary_weight(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.binary_weight(), self.bias)


class IrConv(HostConv):
    """Like IR-Net: the sign of the standardized filter."""

    def binary_weight(self) -> Tensor:
        return ste_sign(standardized(self.weight))


class RecuConv(HostConv):
    """Like ReCU: standardized, clamped to a quantile of the whole layer, sign."""

    tau = 0.9

    def binary_weight(self) -> Tensor:
        w = standardized(self.weight, eps=1e-5) * (2 * math.sqrt(2))
        q = -w.detach().abs().mean() * math.log(2 - 2 * self.tau)
        return ste_sign(torch.minimum(torch.maximum(w, -q), q))


class SimanConv(HostConv):
    """Like SiMaN: the larger half of a filter's magnitudes is +1, the rest −1 (deployed 2b − 1)."""

    def binary_weight(self) -> Tensor:
        magnitude = standardized(self.weight, eps=1e-5).abs()
        median = magnitude.detach().flatten(1).median(1).values.reshape(-1, 1, 1, 1)
        return self.coded(straight_through((magnitude > median).to(magnitude.dtype), magnitude))

    def coded(self, b: Tensor) -> Tensor:
        return 2 * b - 1


class SimanZeroOneConv(SimanConv):
    """SiMaN's training code: {0, 1}."""

    def coded(self, b: Tensor) -> Tensor:
        return b


class ScaledConv(HostConv):
    """Like XNOR-Net: mean|w| · sign(w); its output depends on the weight's length."""

    def binary_weight(self) -> Tensor:
        return self.weight.detach().abs().mean((1, 2, 3), keepdim=True) * ste_sign(self.weight)


class SmoothConv(HostConv):
    """A differentiable stand-in, for comparisons in float64."""

    def binary_weight(self) -> Tensor:
        return 0.3 * standardized(self.weight).tanh()


class HardBinaryConv(nn.Module):
    """Like ReActNet: not an nn.Conv2d, one flat parameter called ``weights``, viewed through ``self.shape``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weights = nn.Parameter((torch.rand(math.prod(self.shape), 1) - 0.5) * 0.2)

    def binary_weight(self) -> Tensor:
        w = self.weights.view(self.shape)
        scale = w.detach().abs().mean((1, 2, 3), keepdim=True)
        return scale * ste_sign(w)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.binary_weight(), stride=self.stride, padding=self.padding)


ConvClass = Callable[..., nn.Module]

HOSTS = (IrConv, RecuConv, SimanConv, HardBinaryConv)


class TinyNet(nn.Module):
    """First convolution, two binary convolutions with BatchNorm, a linear layer; takes (N, 3, 6, 6)."""

    def __init__(self, conv_class: ConvClass) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = conv_class(4, 5, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = conv_class(5, 6, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = self.bn1(self.conv1(x)).tanh()
        x = self.bn2(self.conv2(x)).tanh()
        return self.fc(x.mean((2, 3)))


BINARY_LAYERS = ("conv1", "conv2")


def tiny_net(conv_class: ConvClass = IrConv, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyNet:
    """The network, initialized from ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet(conv_class).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32, n: int = 6) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 4, (n,), generator=generator)


def loss_of(net: nn.Module, seed: int = 0) -> Tensor:
    """Cross-entropy on batch ``seed``, in the network's dtype."""
    x, y = batch(seed, next(net.parameters()).dtype)
    return F.cross_entropy(net(x), y)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, first: int = 0) -> None:
    """The plainest loop, on batches ``first``, ``first + 1``, ..."""
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


def clusters(net: nn.Module) -> dict[str, EPC]:
    """Layer name → cluster."""
    return {name: epc for name, module in net.named_modules() for epc in find(module).values()}


def points(net: nn.Module) -> dict[str, Tensor]:
    """Layer name → a copy of its points."""
    return {name: epc.point.clone() for name, epc in clusters(net).items()}


def latent(epc: EPC) -> Tensor:
    """v, in either mode."""
    return epc.latent if isinstance(epc, InPlace) else epc.parameter.detach()


def latents(net: nn.Module) -> dict[str, Tensor]:
    """Layer name → a copy of its latent."""
    return {name: latent(epc).clone() for name, epc in clusters(net).items()}


def state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {key: value.clone() for key, value in net.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit (NaNs equal each other), keys and their order included."""
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k].nan_to_num(nan=123.0), other[k].nan_to_num(nan=123.0))
        for k in one
    )


def twin(net: nn.Module) -> Any:
    """A deepcopy that has the gradients too."""
    other = copy.deepcopy(net)
    for mine, theirs in zip(net.parameters(), other.parameters()):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    return other


def binary_bits(net: nn.Module) -> Iterator[Tensor]:
    """What each host layer convolves with, as bools."""
    for module in net.modules():
        if isinstance(module, (HostConv, HardBinaryConv)):
            yield module.binary_weight().detach() > 0
