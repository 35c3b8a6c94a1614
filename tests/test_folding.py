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


class Padding(nn.Module):
    """A shortcut that fills zeros in place, as option A of ResNets is often written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = IrConv(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.size(0), 5, *x.shape[2:])
        out[:, :3] = x
        out[:, 1].mul_(2.0)
        result: Tensor = (self.conv(x) + 5 * out).mean((2, 3))
        return result


class OfAConstant(nn.Module):
    """Convolves a tensor of its own, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Buffer(torch.randn(1, 3, 6, 6)) if hasattr(nn, "Buffer") else torch.randn(1, 3, 6, 6)
        self.first, self.second = IrConv(3, 4, 3), IrConv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.first(self.prompt) + self.second(x)).mean((2, 3))
        return result


@pytest.mark.parametrize(("model_class", "layers"), [(Padding, ("conv",)), (OfAConstant, ("second",))])
def test_what_depends_on_the_input_is_not_folded_and_what_does_not_is(
    model_class: type[nn.Module], layers: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = model_class().eval()
    folded = fold(model, torch.randn(2, 3, 6, 6))
    other = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(folded.graph(other), model(other))
    assert folded.layers == layers
    program, found = with_binary_convolutions(folded, model)
    torch.testing.assert_close(program.module()(other), model(other))
    assert [layer.name for layer in found] == list(layers)


class Remembering(nn.Module):
    """Keeps its activations in a list, for a distillation loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = tiny_net(), []

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        self.seen = [result]
        return result


def test_a_model_that_keeps_activations_is_copied() -> None:
    model = Remembering()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    fold(model, torch.randn(2, 3, 6, 6))
    assert model.seen[0].grad_fn is not None
