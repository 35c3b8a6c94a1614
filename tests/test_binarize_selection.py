"""apply(model, binarize=...): which modules of a full-precision model are replaced, also where one occurs twice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import hbnn_plugin
from full_precision_nets import BINARIZED, both, classes, resnet
from hbnn_plugin import by_class, by_name
from tiny_hosts import IrConv, batch, clusters, same_state, state, tiny_net, train
from training_helpers import each_mode

# -- selection --------


def test_a_custom_predicate() -> None:
    net = hbnn_plugin.apply(resnet(), binarize="1/32", where=by_name(r"downsample\.0", "layer1.conv1"))
    assert list(clusters(net)) == ["layer1.conv1", "layer2.downsample.0"]
    assert type(net.layer1.conv2) is nn.Conv2d


@both
def test_a_model_that_is_itself_the_convolution(binarize: str) -> None:
    """Nothing holds it, so it cannot be replaced."""
    net = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        hbnn_plugin.apply(net, binarize=binarize, where=lambda module, name: True)
    assert type(net) is nn.Conv2d
    assert not clusters(net)


@pytest.mark.parametrize("word", ["downsample", "shortcut", "skip_conv", "identity", "proj", "Projection"])
def test_pointwise_convolutions_with_the_name_of_a_shortcut_stay_as_they_are(word: str) -> None:
    net = nn.Sequential()
    for name, kernel in (("first", 3), (word, 1), ("pointwise", 1), ("last", 3)):
        net.add_module(name, nn.Conv2d(4, 4, kernel))
    assert [layer.name for layer in hbnn_plugin.plan(net, binarize="1/32").layers] == ["pointwise"]


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


class HeadFirst(nn.Module):
    """Registers its classifier before its convolutions, and names a shortcut of stride 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.short = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 3)


def test_the_first_convolution_and_the_last_layer_stay_where_a_linear_layer_is_registered_first() -> None:
    """Of a decoder the last convolution is the output; of a network whose classifier comes first one layer too many."""
    planned = hbnn_plugin.plan(HeadFirst(), binarize="1/32")
    assert [layer.label for layer in planned.layers] == ["conv2"]


def test_frozen_convolutions_are_not_binarized_unless_they_are_named() -> None:
    net = HeadFirst()
    net.conv2.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen: conv2"):
        hbnn_plugin.plan(net, binarize="1/32")
    assert type(net.conv2) is nn.Conv2d
    assert hbnn_plugin.plan(net, binarize="1/32", where=hbnn_plugin.by_name("conv[23]")).frozen == ()
    planned = hbnn_plugin.plan(nn.Sequential(net, nn.Linear(2, 2)), binarize="1/32")
    assert [layer.label for layer in planned.layers] == ["0.conv3"] and planned.frozen == ("0.conv2",)


class InAList(nn.Module):
    """Runs its layers from a plain list, which no module knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU()
        self.order = [self.first, self.act, self.second, self.third]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


@each_mode
def test_layers_that_are_also_held_in_a_plain_list_are_binary_there(mode: Any) -> None:
    net = hbnn_plugin.apply(InAList(), binarize="1/1", mode=mode)
    assert net.order[2] is net.second and isinstance(net.order[1], nn.Hardtanh)
    x = torch.randn(2, 3, 5, 5)
    inside = net.second(net.act(net.first(x)))
    torch.testing.assert_close(net(x), net.third(inside))
    assert len(inside.detach()[:, :, 2, 2].abs().mul(1e4).round().unique()) < 30  # sums of 27 times ±scale, and a bias
    before = net.eval()(x)
    torch.testing.assert_close(hbnn_plugin.fuse(net)(x), before)
