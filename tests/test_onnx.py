"""Networks as ONNX files: weights of ±1, checked in onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.export import to_onnx
from hosts import HOSTS
from hosts.networks import resnet8
from tiny_hosts import SimanConv, same_state, state, tiny_net
from torch_version import since

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    since(2, 5, "export by way of torch.export"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript.*"),
]


def run(path: Path, x: Tensor) -> Tensor:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def initializers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def trained_a_little(host: str) -> nn.Module:
    torch.manual_seed(0)
    net = hbnn_plugin.apply(resnet8(HOSTS[host].conv, width=8), start=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(8, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    return net


def test_an_applied_network(tmp_path: Path) -> None:
    net, x, path = trained_a_little("irnet"), torch.randn(1, 3, 16, 16), tmp_path / "net.onnx"
    before = state(net)
    agreed = to_onnx(net, x, path)
    assert agreed.same_top1 == agreed.rows == 1 and agreed.difference <= 1e-4 * agreed.largest
    assert same_state(before, state(net)) and net.training
    assert list(tmp_path.iterdir()) == [path]
    onnx.checker.check_model(path)
    several = torch.randn(5, 3, 16, 16)  # the batch is free
    assert torch.allclose(run(path, several), net.eval()(several), atol=1e-4)


def test_weights_are_signs(tmp_path: Path) -> None:
    """Whatever the host makes its binary weights from; also of layers with real activations and a bias."""
    torch.manual_seed(0)
    net, x, path = tiny_net(SimanConv), torch.randn(3, 3, 6, 6), tmp_path / "net.onnx"
    to_onnx(net, x, path)
    held = initializers(path)
    for name in ("conv1", "conv2"):
        layer = net.get_submodule(name)
        assert np.array_equal(held[f"{name}_weight_signs"], layer.binary_weight().detach().numpy())
        assert layer.bias is not None
    assert torch.allclose(run(path, x), net.eval()(x), atol=1e-5)


class ReadsSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()
        self.net.fc = nn.Identity()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).view(x.size(0), -1))


def test_sizes_in_the_code_fix_the_batch(tmp_path: Path) -> None:
    net, x, path = ReadsSizes(), torch.randn(3, 3, 6, 6), tmp_path / "net.onnx"
    to_onnx(net, x, path)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 3, 6, 6]
    assert torch.allclose(run(path, x), net.eval()(x), atol=1e-5)


def test_what_it_refuses_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("what was there")
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match="no convolution of Conv2d has binary weights"):
        to_onnx(nn.Conv2d(3, 4, 3), x, path)
    with pytest.raises(ValueError, match="onnxruntime does not compute what torch does"):
        to_onnx(tiny_net(), x, path, tolerance=-1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'hbnn-plugin\[onnx\]'"):
        to_onnx(tiny_net(), x, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "what was there"


class Flattening(nn.Module):
    """Ends with a size taken for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = HOSTS["plain"].conv(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(self.conv(x), 1).view(x.size(0), -1)


def test_where_the_model_takes_a_size_for_a_number_the_batch_is_the_examples(tmp_path: Path) -> None:
    model, x = Flattening().eval(), torch.randn(1, 3, 6, 6)
    to_onnx(model, x, tmp_path / "net.onnx")
    assert onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x), rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """A convolution whose bias depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.linear(x.mean((0, 2, 3)))
        return nn.functional.conv2d(x.sign(), self.weight.sign(), bias).mean((2, 3))


def test_a_bias_that_depends_on_the_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shifted().eval()
    to_onnx(model, torch.randn(2, 3, 6, 6), tmp_path / "net.onnx")
    other = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(run(tmp_path / "net.onnx", other), model(other), rtol=1e-4, atol=1e-5)
