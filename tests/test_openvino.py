"""Networks in OpenVINO: binary layers on 1-bit operands, with the numbers of torch."""

from __future__ import annotations

import copy
import gc
import signal
import sys
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.export import load_packed, save_packed, to_openvino
from hbnn_plugin.export.xnor import XnorModel
from hosts import HOSTS
from hosts.networks import resnet8
from idiom_hosts import ClippedConv
from tiny_hosts import same_state, state, tiny_net

ov = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")


def export(model: nn.Module, x: Tensor, **options: Any) -> XnorModel:
    return to_openvino(model, x, threads=1, **options)


def binary(xnor: XnorModel) -> list[bool]:
    return [layer.binary for layer in xnor.layers]


def whole_numbers(*shape: int, zeros: bool = True) -> Tensor:
    """−1, 1, and many zeros."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-1, 2, shape, generator=generator).float()
    return drawn if zeros else drawn + 0.5


# -- one layer, on whole numbers: equal to the last bit ----------------------------------------------------------------


def plus_at_zero(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def minus_at_zero(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) * 2 - 1


class Layer(nn.Module):
    """One convolution of signs with ±2ⁱ, so that its sums are exact."""

    def __init__(self, sign: Callable[[Tensor], Tensor], inputs: int = 8, outputs: int = 3, **options: Any) -> None:
        super().__init__()
        self.sign = sign
        self.conv = nn.Conv2d(inputs, outputs, **{"kernel_size": 3, "padding": 1, **options})
        with torch.no_grad():
            scales = 2.0 ** torch.arange(outputs).view(-1, 1, 1, 1)
            self.conv.weight.copy_(plus_at_zero(self.conv.weight) * scales)
            if self.conv.bias is not None:
                self.conv.bias.mul_(8).round_()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.sign(x))


@settings(max_examples=5, deadline=None)
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


def clipped(x: Tensor) -> Tensor:
    x = x.clamp(-1, 1)
    return x + (plus_at_zero(x) - x).detach()


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
    "plugin": hbnn_plugin.binarize.sign,
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


# -- networks ----------------------------------------------------------------------------------------------------------


def settle(net: nn.Module) -> nn.Module:
    """BatchNorm as after training: statistics of real inputs, scales of either sign."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, -1, 1, generator=generator)
            nn.init.uniform_(module.bias, -1, 1, generator=generator)
    net.train()(torch.randn(16, 3, 16, 16, generator=generator))
    return net


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hosts_net() -> nn.Module:
    """A network whose layers are of four hosts by turns."""
    torch.manual_seed(0)
    turns = cycle(HOSTS[host].conv for host in ("irnet", "recu", "siman", "plain"))
    return settle(resnet8(lambda *args, **options: next(turns)(*args, **options), width=8))  # noqa: PLW0108


def test_hosts_run_binary() -> None:
    net, x = hosts_net(), images()
    before = state(net)
    xnor = export(net, x)
    assert same_state(before, state(net)) and net.training
    assert [layer.name for layer in xnor.layers] == [f"stages.{i}.0.conv{j}" for i in range(3) for j in (1, 2)]
    assert all(binary(xnor)) and not xnor.notes
    assert torch.allclose(xnor(x), net.eval()(x), atol=1e-4)


@pytest.mark.parametrize("mode", ["parametrize", "inplace"])
def test_applied_and_fused(mode: str) -> None:
    net, x = hbnn_plugin.apply(hosts_net(), mode=mode, start=0.5), images()
    xnor = export(net, x)
    assert all(binary(xnor)) and hbnn_plugin.flip_ratio(net).total == 0  # still applied
    expected = hbnn_plugin.fuse(copy.deepcopy(net)).eval()(x)
    assert torch.allclose(xnor(x), expected, atol=1e-4)


@pytest.mark.parametrize("binarize", ["1/1", "1/32"])
def test_a_binarized_model(binarize: str) -> None:
    torch.manual_seed(0)
    stem, body = nn.Conv2d(3, 8, 3), (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(stem, nn.ReLU(), *body, nn.Flatten(), nn.Linear(1152, 4))
    net, x = settle(hbnn_plugin.apply(net, binarize=binarize)), images()
    expected = net.eval()(x)
    for model in (net, hbnn_plugin.fuse(net)) if binarize == "1/1" else (net,):
        xnor = export(model, x)
        assert binary(xnor) == [binarize == "1/1"]
        assert xnor.notes == (() if binarize == "1/1" else ("2: its input is not binary",))
        assert torch.allclose(xnor(x), expected, atol=1e-4)


class MyConv(nn.Module):
    """A user's own: another name for its weight, its scale behind the convolution, groups."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs // groups, 3, 3))
        self.stride, self.groups = stride, groups

    def forward(self, x: Tensor) -> Tensor:
        signs = (self.kernel > 0).float() * 2 - 1
        alpha = self.kernel.abs().mean((1, 2, 3)).view(-1, 1, 1)
        return F.conv2d(clipped(x), signs, None, self.stride, 1, 1, self.groups) * alpha


class MyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.one, self.two, self.three = MyConv(12, 12), MyConv(12, 12, groups=3), MyConv(12, 20, stride=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(20)])
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norms[0](self.one(x))
        x = x + self.norms[1](self.two(x))
        x = self.norms[2](self.three(x))
        return self.head(x.mean((2, 3)).view(x.size(0), -1))


def test_an_own_network_with_groups() -> None:
    torch.manual_seed(0)
    net, x = settle(MyResNet()), images()
    xnor = export(net, x)
    assert [(layer.name, layer.binary, layer.note) for layer in xnor.layers] == [
        ("one", True, ""),
        ("two", False, "it has 3 groups, the binary convolution has none"),
        ("three", True, ""),
    ]
    assert torch.allclose(xnor(x), net.eval()(x), atol=1e-4)
    assert "3 groups" in repr(xnor) and "2 of 3 layers run on bits" in repr(xnor)


class EditingConv(ClippedConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(plus_at_zero(x))


def test_a_host_that_writes_into_its_weight_is_left_alone() -> None:
    net, x = tiny_net(EditingConv), torch.randn(2, 3, 6, 6)
    before = state(net)
    xnor = export(net, x)
    assert same_state(before, state(net))
    assert all(binary(xnor)) and torch.allclose(xnor(x), net.eval()(x), atol=1e-5)


def test_from_a_packed_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    net, x = hosts_net(), images()
    save_packed(net, tmp_path / "net.safetensors")
    xnor = export(load_packed(tmp_path / "net.safetensors", hosts_net()), x)
    assert all(binary(xnor)) and torch.allclose(xnor(x), net.eval()(x), atol=1e-4)


def test_real_activations_stay_float() -> None:
    xnor = export(tiny_net(), torch.randn(2, 3, 6, 6))
    assert xnor.notes == ("conv1: its input is not binary", "conv2: its input is not binary")


# -- the result --------------------------------------------------------------------------------------------------------


def test_calls_and_saved_files(tmp_path: Path) -> None:
    layer, x = Layer(plus_at_zero), whole_numbers(1, 8, 5, 5)
    xnor = export(layer, x)
    expected = layer(x)
    first = xnor(x)
    xnor(-x)
    assert torch.equal(first, expected)  # not overwritten by the second call
    assert torch.equal(torch.from_numpy(xnor(x.numpy())), expected)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 5, 5\), not \(2, 8, 5, 5\)"):
        xnor(torch.cat([x, x]))
    ov.save_model(xnor.graph, tmp_path / "net.xml", compress_to_fp16=False)
    again = ov.Core().compile_model(tmp_path / "net.xml", "CPU")
    assert torch.equal(torch.from_numpy(again(x.numpy())[0]), expected)


class Moody(Layer):
    """Its output is another one each time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Moody.calls += 1
        return super().forward(x) * Moody.calls


def test_it_refuses_what_torch_does_not_compute() -> None:
    with pytest.raises(ValueError, match=r"OpenVINO does not compute what torch does: same top-1 .* tolerance 0\.1"):
        export(Moody(plus_at_zero), whole_numbers(1, 8, 5, 5))


def test_bad_input_is_one_error() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="no convolution of Conv2d has binary weights"):
        export(nn.Conv2d(3, 4, 3), x)
    with pytest.raises(TypeError, match="one tensor, not a list"):
        export(hosts_net(), [x])
    with pytest.raises(ValueError, match=r"float32; the example input is torch\.float64"):
        export(hosts_net(), x.double())
    with pytest.raises(ValueError, match=r"float32; conv1\.weight is torch\.bfloat16"):
        export(hosts_net().bfloat16(), x)
    with pytest.raises(ValueError, match=r"has to return one tensor.* it returns a tuple"):
        export(nn.LSTM(4, 4), torch.randn(2, 4))


def test_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'hbnn-plugin\[openvino\]'"):
        export(hosts_net(), images())


def test_the_process_takes_signals_after_several_networks_have_gone() -> None:
    """With a runtime core each, OpenVINO leaves the process without a signal stack: it would die here."""
    several = [export(tiny_net(), torch.randn(1, 3, 8, 8)) for _ in range(2)]
    while several:
        del several[0]
        gc.collect()
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]
