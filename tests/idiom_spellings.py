"""What a host's forward may do to its weight, and the ways to write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from idiom_hosts import BOUND
from tiny_hosts import HostConv, ScaledConv


def _assigned(self: nn.Conv2d) -> None:
    self.weight.data = self.weight.data.clamp(-BOUND, BOUND)


def _augmented(self: nn.Conv2d) -> None:
    self.weight.data -= self.weight.data.mean()


def _called(self: nn.Conv2d) -> None:
    self.weight.data.mul_(0.5).clamp_(-BOUND, BOUND)


def _under_another_name(self: nn.Conv2d) -> None:
    w = self.weight
    w.data = w.data.clamp(-BOUND, BOUND)


def _data_under_another_name(self: nn.Conv2d) -> None:
    w = self.weight.data
    w.clamp_(-BOUND, BOUND)


def _by_index(self: nn.Conv2d) -> None:
    self.weight.data[:] = self.weight.data.clamp(-BOUND, BOUND)


def _as_out(self: nn.Conv2d) -> None:
    torch.clamp(self.weight.data, -BOUND, BOUND, out=self.weight.data)


def _detached(self: nn.Conv2d) -> None:
    self.weight.detach().clamp_(-BOUND, BOUND)


@torch.no_grad()
def _decorated(self: nn.Conv2d) -> None:
    self.weight.clamp_(-BOUND, BOUND)


EDITS = (
    _assigned,
    _augmented,
    _called,
    _under_another_name,
    _data_under_another_name,
    _by_index,
    _as_out,
    _detached,
    _decorated,
)


def _read(self: nn.Conv2d) -> None:
    self.weight.data.clamp(-BOUND, BOUND)


def _computed(self: nn.Conv2d) -> None:
    w = self.weight.data
    w = w - w.mean()
    w /= w.std()
    w.clamp_(-1, 1)


def _watched(self: nn.Conv2d) -> None:
    self.weight.register_hook(torch.clone)


READS = (_read, _computed, _watched)


def touching(touch: Callable[[Any], None]) -> type[HostConv]:
    """A convolution that begins its forward with ``touch``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.touch()
        return ScaledConv.forward(self, x)

    return type("TouchingConv", (ScaledConv,), {"touch": touch, "forward": forward})


class OldStyleConv(ScaledConv):
    """Initializes through ``.data``, at construction only."""

    def reset_parameters(self) -> None:
        self.weight.data.uniform_(-BOUND, BOUND)
        if self.bias is not None:
            self.bias.data.zero_()
