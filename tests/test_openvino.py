"""Networks in OpenVINO: binary layers on 1-bit operands, with the numbers of torch."""

from __future__ import annotations

import copy
import gc
import signal
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.export import load_packed, save_packed
from hosts import HOSTS
from hosts.networks import resnet8
from idiom_hosts import ClippedConv
from openvino_layers import Layer, binary, clipped, export, plus_at_zero, whole_numbers
from tiny_hosts import same_state, state, tiny_net
from training_helpers import each_mode

ov = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")


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


@each_mode
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
    with pytest.raises(ValueError, match="forward of Moody cannot be traced: its trace gives logits that differ"):
        export(Moody(plus_at_zero), whole_numbers(1, 8, 5, 5))
    with pytest.raises(ValueError, match=r"OpenVINO does not compute what torch does: same top-1 .* tolerance -1"):
        export(Layer(plus_at_zero), whole_numbers(1, 8, 5, 5), tolerance=-1)


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
