"""fold: what other runtimes get is what the model computes, whatever its forward does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.export.binary_graph import with_binary_convolutions
from hbnn_plugin.export.folding import fold
from tiny_hosts import IrConv, tiny_net


class Writing(nn.Module):
    """Edits its activations as BinaryNet.pytorch does, where no trace sees it, or visibly."""

    def __init__(self, visibly: bool) -> None:
        super().__init__()
        self.visibly = visibly
        self.conv = IrConv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if self.visibly:
            x = x.sign()
        else:
            x.data = x.data.sign()
        result: Tensor = self.conv(x).mean((2, 3))
        return result


def test_an_edit_that_no_trace_shows_is_refused() -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"forward of Writing cannot be traced.*differ by.*an activation's \.data"):
        fold(Writing(visibly=False), x)
    fold(Writing(visibly=True), x)


class Shifting(nn.Module):
    """Begins by changing its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x.sub_(0.5))
        return result


def test_the_example_stays_as_it_is() -> None:
    model, x = Shifting().eval(), torch.randn(2, 3, 6, 6)
    before = x.clone()
    folded = fold(model, x)
    assert torch.equal(x, before) and torch.equal(folded.example, before)
    torch.testing.assert_close(folded.output, model(x.clone()))


class Keeping(nn.Conv2d):
    """Keeps the weight that it has computed."""

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.weight + (self.weight.sign() - self.weight).detach()
        return F.conv2d(x, self.kept)


def test_a_host_that_keeps_a_weight_with_its_history_can_be_looked_at() -> None:
    net = tiny_net(Keeping)
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    assert net.conv1.kept.grad_fn is not None
    found = hbnn_plugin.complexity(net, (3, 6, 6))
    assert found["conv1"].bits == found["conv2"].bits == 1
    assert net.conv1.kept.grad_fn is not None


@pytest.mark.parametrize("how", ["DataParallel", "compiled"])
def test_wrappers_are_looked_through(how: str) -> None:
    net, x = tiny_net(), torch.randn(2, 3, 6, 6)
    wrapped: nn.Module = nn.DataParallel(net) if how == "DataParallel" else torch.compile(net, backend="eager")  # type: ignore[assignment]
    layers = [layer.name for layer in with_binary_convolutions(fold(wrapped, x), wrapped)[1]]
    assert layers == ["conv1", "conv2"]
    assert list(hbnn_plugin.complexity(wrapped, (3, 6, 6))) == list(hbnn_plugin.complexity(net, (3, 6, 6)))
