"""apply(model, binarize=...): binary convolutions for a full-precision model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_class, by_name
from hbnn_plugin.binarize import BinaryConv2d, SignConv2d, sign
from tiny_hosts import IrConv, batch, clusters, same_state, state, tiny_net, train


class Block(nn.Module):
    """A residual block as torchvision writes it: one nn.ReLU, used twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=True)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.layer1 = Block(4, 4, 1)
        self.layer2 = Block(4, 6, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


BINARIZED = ["layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]
both = pytest.mark.parametrize("binarize", ["1/1", "1/32"])


def resnet(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet()


def classes(net: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in net.named_modules() if ".parametrizations" not in name}


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


@both
def test_forward_and_gradients_are_equations_2_to_4(binarize: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    with torch.no_grad():
        conv.weight *= 8  # some |w| > 1
    w = conv.weight.detach().clone()
    w[0, 0, 0, 0] = conv.weight.data[0, 0, 0, 0] = 0.0
    layer = BinaryConv2d.convert(conv, binarize)
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


# -- selection --------


def test_a_custom_predicate() -> None:
    net = hbnn_plugin.apply(resnet(), binarize="1/32", where=by_name(r"downsample\.0", "layer1.conv1"))
    assert list(clusters(net)) == ["layer1.conv1", "layer2.downsample.0"]
    assert type(net.layer1.conv2) is nn.Conv2d


@both
def test_a_model_that_is_itself_the_convolution(binarize: str) -> None:
    """Nothing holds it, so it cannot be replaced: refused, or changed in place, but never taken for binary as it is."""
    net = nn.Conv2d(3, 4, 3)
    try:
        net = hbnn_plugin.apply(net, binarize=binarize, where=lambda module, name: True)
    except ValueError:
        assert not clusters(net)
    else:
        assert isinstance(net, BinaryConv2d)


def test_fully_convolutional_and_pointwise_networks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(4, 4, k) for k in (3, 3, 1, 3)))
    assert [layer.name for layer in hbnn_plugin.plan(net, binarize="1/1").layers] == [
        "1",
        "2",
    ]  # 2: 1×1, but no shortcut


@pytest.mark.parametrize(
    ("build", "options", "fragments"),
    [
        (resnet, {"binarize": "1/4"}, ["binarize", "'1/4'", "'1/1'", "'1/32'"]),
        (resnet, {"binarize": 1}, ["binarize", "not 1"]),
        (resnet, {}, ["found no binary convolution in ResNet", "6 Conv2d", 'binarize="1/1"']),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(3, 3)),
            {"binarize": "1/1"},
            ["found no convolution to binarize", "1 nn.Conv2d"],
        ),
        (lambda: nn.Sequential(nn.ReLU()), {"binarize": "1/1"}, ["found no convolution to binarize", "0 nn.Conv2d"]),
        (resnet, {"binarize": "1/1", "where": by_class(nn.Linear)}, ["plain nn.Conv2d", "fc"]),
        (tiny_net, {"binarize": "1/1", "where": by_class(IrConv)}, ["plain nn.Conv2d", "conv1, conv2"]),
        (resnet, {"binarize": "1/1", "where": by_name("nothing")}, ["found no convolution to binarize"]),
        (resnet, {"binarize": "1/1", "radius": -1}, ["radius"]),
    ],
)
def test_bad_input_is_refused_before_anything_changes(
    build: Any, options: dict[str, Any], fragments: list[str]
) -> None:
    net = build()
    before, modules = state(net), dict(net.named_modules())
    for function in (hbnn_plugin.plan, hbnn_plugin.apply):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (matched below)
            function(net, **options)
        for fragment in fragments:
            assert fragment in str(caught.value)
    assert same_state(state(net), before)
    assert dict(net.named_modules()) == modules


def test_nan_weights_are_refused_before_anything_is_binarized() -> None:
    net = resnet()
    net.layer1.conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer1\.conv2 .*1 non-finite"):
        hbnn_plugin.apply(net, binarize="1/1")
    assert classes(net) == classes(resnet())


@both
def test_plan_shows_it_and_changes_nothing(binarize: str) -> None:
    net = resnet()
    made = hbnn_plugin.plan(net, binarize=binarize)
    assert [layer.name for layer in made.layers] == BINARIZED
    assert f"binarize='{binarize}'" in repr(made)
    assert classes(net) == classes(resnet())


# -- modules that occur more than once --------


def test_one_relu_module_used_in_many_places_is_replaced_in_all() -> None:
    torch.manual_seed(0)
    relu = nn.ReLU()
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 4, 1), relu, nn.Flatten(), nn.Linear(16, 2)
    )
    hbnn_plugin.apply(net, binarize="1/1")
    assert [type(net[i]) for i in (1, 3, 5)] == [nn.Hardtanh] * 3


@pytest.mark.parametrize("nested", [False, True])
def test_one_convolution_used_in_many_places_is_replaced_in_all(nested: bool) -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    again = nn.Sequential(shared) if nested else shared
    net = nn.Sequential(nn.Conv2d(3, 4, 1), shared, again, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    hbnn_plugin.apply(net, binarize="1/32")
    second = net[2][0] if nested else net[2]
    assert second is net[1]
    assert type(second).__name__ == "ParametrizedBinaryConv2d"
    x = batch()[0]
    expected = net(x)
    assert torch.equal(hbnn_plugin.fuse(net)(x), expected)


@both
def test_tied_weights_stay_tied(binarize: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)
    )
    net.insert(3, nn.Conv2d(3, 3, 3, padding=1))
    net[2].weight = net[1].weight
    hbnn_plugin.apply(net, binarize=binarize)
    train(net, SGD(net.parameters(), lr=0.1), 2)
    assert net[1].parametrizations.weight is net[2].parametrizations.weight
    net.eval()
    x = batch()[0]
    expected = net(x)
    hbnn_plugin.fuse(net)
    assert net[1].weight is net[2].weight
    assert torch.equal(net(x), expected)


# -- functional relu --------


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(F.relu(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize("training_at_apply", [True, False])
def test_a_functional_relu_is_reported_once(training_at_apply: bool) -> None:
    torch.manual_seed(0)
    net = Functional().train(training_at_apply)
    hbnn_plugin.apply(net, binarize="1/1")
    net.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            net(batch(seed)[0])
    assert len(caught) == 1
    assert "functional relu" in str(caught[0].message)
    assert "nn.Hardtanh()" in str(caught[0].message)


def test_no_such_report_for_real_valued_activations_or_modules() -> None:
    torch.manual_seed(0)
    net = hbnn_plugin.apply(Functional(), binarize="1/32")
    net(batch()[0])
    hbnn_plugin.apply(resnet(), binarize="1/1")(batch()[0])
