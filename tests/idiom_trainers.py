"""More tiny hosts: layers and trainers that look at a weight's gradient, keep a second copy of it, or collect it.

Like those of :mod:`idiom_hosts`, written from what public codebases do, in our words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hbnn_plugin
from idiom_hosts import BOUND, FILTER, BinBlock, Captured, Host
from tiny_hosts import ScaledConv, loss_of, ste_sign


class LateZero(Host):
    """Clears the gradients after the forward, which therefore still sees those of the step before."""

    def step(self, seed: int) -> float:
        loss = loss_of(self.net, seed)
        self.optimizer.zero_grad()
        loss.backward()
        self.between()
        self.optimizer.step()
        return loss.item()

    def between(self) -> None:
        """What the trainer does to the gradients."""


class PulledConv(ScaledConv):
    def pulled(self) -> Tensor:
        return self.weight if self.weight.grad is None else self.weight - 0.5 * self.weight.grad

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().mean(FILTER, keepdim=True)
        return self._conv_forward(x, scale * ste_sign(self.pulled()), self.bias)


class GradientInForward(LateZero):
    """Like RBONN: the last gradient takes part in the forward."""

    conv = PulledConv


class RescaledConv(ScaledConv):
    @torch.no_grad()
    def rescale(self) -> None:
        size = self.weight.grad.flatten(1).norm(dim=1).clamp(min=1e-6).reshape(-1, 1, 1, 1)  # type: ignore[union-attr]
        self.weight.grad = self.weight.grad / size + 0.01 * self.weight  # type: ignore[operator]


class GradientInMethod(LateZero):
    """Like OvSW: the trainer lets each layer rewrite its gradient."""

    conv = RescaledConv

    def between(self) -> None:
        for m in self.net.modules():
            if isinstance(m, RescaledConv):
                m.rescale()


class BesideConv(nn.Module):
    """Holds the real weight itself, and a convolution whose weight it overwrites with the binary one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)
        self.real = nn.Parameter(self.conv.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        self.real.data.clamp_(-BOUND, BOUND)
        self.conv.weight.data.copy_(self.real.detach().abs().mean(FILTER, keepdim=True) * self.real.sign())
        return self.conv(ste_sign(x))

    def update_gradient(self) -> None:
        self.real.grad = self.conv.weight.grad * self.real.detach().abs().mean(FILTER, keepdim=True)  # type: ignore[operator]
        self.real.grad = self.real.grad * 2


class RealBeside(LateZero):
    """Like lucamocerino's XNOR layers."""

    conv = BesideConv
    where = staticmethod(hbnn_plugin.by_class(BesideConv))

    def between(self) -> None:
        for m in self.net.modules():
            if isinstance(m, BesideConv):
                m.update_gradient()


class AuxiliaryCopies(Captured):
    """Like md-bnn's BinaryConnect: copies of all parameters, by number, while the signs are in their place."""

    conv = BinBlock

    def __init__(self) -> None:
        Host.__init__(self)

    def ready(self) -> None:
        Host.ready(self)
        self.copies = [p.detach().clone() for p in self.net.parameters()]

    def binarize(self) -> None:
        for p, saved in zip(self.net.parameters(), self.copies):
            saved.copy_(p.data)
            if p.ndim == 4:
                p.data = BOUND * p.data.sign()

    def step(self, seed: int) -> float:
        self.binarize()
        self.optimizer.zero_grad()
        loss = loss_of(self.net, seed)
        loss.backward()
        for p, saved in zip(self.net.parameters(), self.copies):
            p.data.copy_(saved)
        self.optimizer.step()
        return loss.item()


class CollectedWeights(Host):
    """Like EWGS: the trainer collects ``m.weight`` of each layer for its optimizer."""

    def groups(self) -> list[dict[str, Any]]:
        layers = [m for m in self.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
        return [{"params": [p for m in layers for p in (m.weight, m.bias) if p is not None]}]


class CountingConv(ScaledConv):
    """Keeps, in every way there is, what its forward has seen: a parameter, a buffer, a tensor, a list, a number."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.code = nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.largest = torch.zeros(1)
        self.seen: list[int] = []
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.code.data = self.weight.detach().sign()
        self.calls += 1
        self.largest.fill_(float(x.abs().max()))
        self.seen.append(len(x))
        self.step += 1
        self.latest = x
        return F.conv2d(x, self.binary_weight(), self.bias, self.stride, self.padding)
