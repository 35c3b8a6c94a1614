"""apply(model, binarize=...): what the binary convolutions of a full-precision model compute, and the way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import hbnn_plugin
from full_precision_nets import BINARIZED, both, classes, resnet
from hbnn_plugin.retrofit.binary_layers import BinaryConv2d, SignConv2d, sign
from tiny_hosts import batch, clusters, same_state, state, train


@both
def test_what_is_binarized_and_what_stays(binarize: str) -> None:
    net, plain = resnet(), resnet()
    identities = {id(p) for p in net.parameters()}
    hbnn_plugin.apply(net, binarize=binarize)
    assert [name for name, m in net.named_modules() if isinstance(m, BinaryConv2d)] == BINARIZED
    assert list(clusters(net)) == BINARIZED
    for name, cls in classes(plain).items():
        now = type(net.get_submodule(name))
        if cls is nn.ReLU:
            assert now is (nn.Hardtanh if binarize == "1/1" else nn.ReLU)
            assert net.get_submodule(name).inplace is plain.get_submodule(name).inplace
        elif name not in BINARIZED:
            assert now is cls
    assert {id(p) for p in net.parameters()} == identities
    for name in ("conv1", "layer2.downsample.0", "fc"):
        assert torch.equal(net.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_a_normalized_classifier_keeps_its_relus() -> None:
    head = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)
    hbnn_plugin.apply(net, binarize="1/1")
    assert [type(net[i]) for i in (1, 4, 9)] == [nn.Hardtanh, nn.Hardtanh, nn.ReLU]


@both
def test_forward_and_gradients_are_equations_2_to_4(binarize: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    with torch.no_grad():
        conv.weight *= 8  # some |w| > 1
    w = conv.weight.detach().clone()
    w[0, 0, 0, 0] = conv.weight.data[0, 0, 0, 0] = 0.0
    BinaryConv2d.convert(conv, binarize)
    layer = conv
    x = (2 * torch.randn(3, 4, 5, 5)).requires_grad_()
    x.data[0, 0, 0, 0] = 0.0
    y = layer(x)
    scale = w.abs().mean((1, 2, 3), keepdim=True)
    wb = (scale * torch.where(w >= 0, 1.0, -1.0)).requires_grad_()
    xb = (torch.where(x >= 0, 1.0, -1.0) if binarize == "1/1" else x).detach().requires_grad_()
    expected = F.conv2d(xb, wb, conv.bias, 2, 1, 1, 2)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    expected.backward(upstream)
    assert 0 < int((w.abs() > 1).sum()) < w.numel()
    torch.testing.assert_close(layer.weight.grad, wb.grad * scale * (w.abs() <= 1))
    torch.testing.assert_close(x.grad, xb.grad * (x.abs() <= 1) if binarize == "1/1" else xb.grad)


def test_sign() -> None:
    x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, 1, 1, 1, 1, 1]
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert torch.equal(torch.vmap(sign)(x.detach().reshape(7, 1)), y.detach().reshape(7, 1))


@both
@pytest.mark.parametrize("options", [{}, {"space": "sphere", "per": "layer"}, {"relative": True}], ids=str)
def test_weights_are_plus_minus_their_mean_magnitude_and_train(binarize: str, options: dict[str, Any]) -> None:
    net = hbnn_plugin.apply(resnet(), binarize=binarize, **options)
    before = {name: epc.point.clone() for name, epc in clusters(net).items()}
    train(net, SGD(net.parameters(), lr=0.1), 3)
    for name in BINARIZED:
        layer = net.get_submodule(name)
        w, wb = layer.weight.detach(), layer.binary_weight().detach()
        torch.testing.assert_close(wb, w.sign() * w.abs().mean((1, 2, 3), keepdim=True))
        assert not torch.equal(clusters(net)[name].point, before[name])
    assert list(hbnn_plugin.flip_ratio(net)) == BINARIZED
    hbnn_plugin.cluster_report(net)


@both
def test_fuse_gives_plain_convolutions_of_equal_output(binarize: str) -> None:
    net = hbnn_plugin.apply(resnet(), binarize=binarize)
    train(net, SGD(net.parameters(), lr=0.1), 2)
    net.eval()
    x = batch(5)[0]
    expected = net(x)
    original, other = net, copy.deepcopy(net)
    hbnn_plugin.fuse(other)
    assert torch.equal(original(x), expected)
    assert torch.equal(other(x), expected)
    for name in BINARIZED:
        layer = other.get_submodule(name)
        assert type(layer) is (SignConv2d if binarize == "1/1" else nn.Conv2d)
        for unit in layer.weight.detach():
            assert len(unit.abs().unique()) == 1
        assert torch.equal(layer.weight, original.get_submodule(name).binary_weight())
    assert list(other.state_dict()) == list(resnet().state_dict())
    if binarize == "1/32":
        assert classes(other) == classes(resnet())
        plain = resnet(1).eval()
        plain.load_state_dict(other.state_dict())
        assert torch.equal(plain(x), expected)
    torch.export.export(other, (x,))
    train(original.train(), SGD(original.parameters(), lr=0.1), 1)
    with pytest.raises(ValueError, match="no exponential parametrization"):
        hbnn_plugin.fuse(other)


@both
def test_full_precision_checkpoints_load_and_go_back(binarize: str) -> None:
    pretrained = resnet(3)
    net = hbnn_plugin.apply(resnet(), binarize=binarize)
    net.load_state_dict(pretrained.state_dict())
    expected = hbnn_plugin.apply(copy.deepcopy(pretrained), binarize=binarize)
    assert same_state(state(net), state(expected))
    pretrained.load_state_dict(hbnn_plugin.plain_state_dict(net.state_dict()))
    torch.testing.assert_close(pretrained.layer1.conv1.weight, resnet(3).layer1.conv1.weight)


def test_attributes_hooks_and_padding_survive() -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", dilation=2) for _ in range(2)]
    convs[1].note = "mine"
    seen = []
    convs[1].register_forward_hook(lambda *_: seen.append(1))
    net = nn.Sequential(convs[0], convs[1], nn.Flatten(), nn.Linear(4 * 49, 2)).eval()
    hbnn_plugin.apply(net, binarize="1/32")
    x = torch.randn(2, 4, 7, 7)
    net(x)
    assert seen == [1]
    assert net[1].note == "mine"
    assert net[1].training is False
    y = F.conv2d(F.pad(net[0](x), (2, 2, 2, 2), mode="reflect"), net[1].binary_weight(), net[1].bias, dilation=2)
    torch.testing.assert_close(net[1](net[0](x)), y)


def test_relus_of_a_real_valued_classifier_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(),
        nn.Linear(8, 2),
    )  # fmt: skip
    hbnn_plugin.apply(model, binarize="1/1")
    assert [type(m).__name__ for m in model if "Conv" not in type(m).__name__] == [
        "Hardtanh", "Hardtanh", "Flatten", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="binarized already"):
        hbnn_plugin.apply(model, binarize="1/1")
    hbnn_plugin.fuse(model)
    with pytest.raises(ValueError, match="found no binary convolution"):
        hbnn_plugin.apply(model)
