"""One layer in OpenVINO, on whole numbers: equal to torch to the last bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hbnn_plugin.retrofit import binary_layers
from openvino_layers import Layer, binary, clipped, export, minus_at_zero, plus_at_zero, whole_numbers

pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")


@settings(max_examples=5)
@given(
    sign=st.sampled_from([plus_at_zero, minus_at_zero]),
    inputs=st.integers(2, 40),
    outputs=st.integers(1, 10),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
)
def test_a_layer_equals_torch_bit_for_bit(**options: Any) -> None:
    layer = Layer(**options)
    x = whole_numbers(2, options["inputs"], 7, 6)
    xnor = export(layer, x)
    assert binary(xnor) == [True]
    assert torch.equal(xnor(x), layer(x))


def test_scales_of_one_and_a_bias_of_zeros_leave_a_layer_its_name() -> None:
    layer, x = Layer(plus_at_zero, outputs=1), whole_numbers(2, 8, 5, 5)
    nn.init.zeros_(layer.conv.bias)
    xnor = export(layer, x)
    assert binary(xnor) == [True] and torch.equal(xnor(x), layer(x))


class SideBySide(nn.Module):
    """Layers on the first channels of one input, as many as they take."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, : layer.conv.in_channels]) for layer in self.layers], 1)


def test_whatever_the_number_of_channels() -> None:
    """OpenVINO alone gives wrong numbers where they are no multiple of 8, in silence."""
    net, x = SideBySide(Layer(plus_at_zero, inputs) for inputs in (1, 3, 6, 8, 12, 13, 16)), whole_numbers(2, 16, 5, 5)
    xnor = export(net, x)
    assert all(binary(xnor)) and torch.equal(xnor(x), net(x))


# -- how hosts write a sign --------------------------------------------------------------------------------------------


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign().add_(0.5).sign_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def polynomial(x: Tensor) -> Tensor:
    """Like Bi-Real Net: a smooth estimator of the sign is added and taken away again."""
    smooth = torch.where(x < -1, -1.0, torch.where(x < 0, x * x + 2 * x, torch.where(x < 1, 2 * x - x * x, 1.0)))
    return plus_at_zero(x).detach() - smooth.detach() + smooth


TWO_VALUED = {
    "autograd function": _Sign.apply,
    "greater": minus_at_zero,
    "ones_like": lambda x: torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x)),
    "masked": lambda x: x.masked_fill(x >= 0, 2.0).clamp(1).mul(2).sub(3),
    "clipped": clipped,
    "polynomial": polynomial,
    "turned": lambda x: -plus_at_zero(x),
    "scaled": lambda x: 0.5 * plus_at_zero(x),
    "channels last": lambda x: plus_at_zero(x).contiguous(memory_format=torch.channels_last),
    "plugin": binary_layers.sign,
}


def test_signs_are_known_by_what_they_do() -> None:
    net, x = SideBySide(map(Layer, TWO_VALUED.values())), whole_numbers(1, 8, 5, 5)
    xnor = export(net, x)
    known = dict(zip(TWO_VALUED, binary(xnor), strict=True))
    assert known == dict.fromkeys(TWO_VALUED, True) and not xnor.notes
    assert torch.allclose(xnor(x), net(x), atol=1e-4)


NO_SIGNS = {
    "tanh": torch.tanh,
    "0 and 1": lambda x: (x >= 0).float(),
    "elsewhere": lambda x: torch.where(x >= 0.5, 1.0, -1.0),
    "by the sample": lambda x: plus_at_zero(x) * x.abs().mean((2, 3), keepdim=True),
    "padded": lambda x: F.pad(plus_at_zero(x)[..., :-1], (0, 1)),
    "by the channel": lambda x: plus_at_zero(x) * torch.arange(8).view(-1, 1, 1),
}


def test_other_inputs_stay_real() -> None:
    net, x = SideBySide(map(Layer, NO_SIGNS.values())), whole_numbers(1, 8, 5, 5, zeros=False)
    xnor = export(net, x)
    assert xnor.notes == tuple(f"layers.{i}.conv: its input is not binary" for i in range(len(NO_SIGNS)))
    assert torch.allclose(xnor(x), net(x), atol=1e-4)


def test_the_third_value_of_torch_sign() -> None:
    layer = Layer(torch.sign)
    with_zeros, without = whole_numbers(1, 8, 5, 5), whole_numbers(1, 8, 5, 5, zeros=False)
    xnor = export(layer, with_zeros)
    assert binary(xnor) == [False] and "sign(0) is 0" in xnor.notes[0]
    assert torch.equal(xnor(with_zeros), layer(with_zeros))
    xnor = export(layer, without)
    assert binary(xnor) == [True] and xnor.notes == ("conv: sign(0) is 0 in the model, here +1",)
    assert torch.equal(xnor(without), layer(without))


def test_binary_layers_with_nothing_in_between() -> None:
    net = nn.Sequential(Layer(plus_at_zero, 8, 16), Layer(plus_at_zero, 16, 3), Layer(minus_at_zero, 3, 2))
    x = whole_numbers(2, 8, 5, 5)
    xnor = export(net, x)
    assert binary(xnor) == [True] * 3
    assert torch.equal(xnor(x), net(x))
    assert torch.equal(xnor(x.bfloat16()), net(x))
