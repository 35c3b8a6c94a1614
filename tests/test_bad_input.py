"""What apply and plan refuse, and with which words, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_class, by_name
from tiny_hosts import IrConv, TinyNet, clusters, same_state, state, tiny_net, train
from training_helpers import applied


def with_weight(weight: Tensor, **options: Any) -> TinyNet:
    net = tiny_net()
    net.conv2.weight = nn.Parameter(weight, **options)
    return net


def nan_net() -> TinyNet:
    net = tiny_net()
    net.conv1.weight.data[1, 2, 0, 0] = torch.nan
    net.conv2.weight.data[0, 0] = torch.inf
    return net


def meta_net() -> TinyNet:
    return tiny_net().to("meta")


def parametrized() -> TinyNet:
    net = tiny_net()
    nn.utils.parametrizations.weight_norm(net.conv2)
    return net


def spectral_norm() -> TinyNet:
    net = tiny_net()
    nn.utils.spectral_norm(net.conv1)
    return net


def zero_filter() -> TinyNet:
    net = tiny_net()
    net.conv2.weight.data[3] = 0
    return net


class FinalConv(IrConv):
    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)


def with_final_conv() -> TinyNet:
    net = tiny_net()
    net.conv2 = FinalConv(5, 6, 3)
    return net


BAD = {
    "no binary convolution": (
        lambda: tiny_net(nn.Conv2d),
        {},
        ValueError,
        [r"TinyNet", r"3 Conv2d", r"by_name", r"binarize"],
    ),
    "nothing with weights": (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, ["no module with parameters"]),
    "not a module": (lambda: tiny_net().state_dict(), {}, TypeError, ["torch.nn.Module", "Dict"]),
    **{
        f"radius {value}": (tiny_net, {"radius": value}, ValueError, ["radius", str(value)])
        for value in (0, -1.0, float("nan"), float("inf"))
    },
    "radius no number": (tiny_net, {"radius": "0.1"}, TypeError, ["radius", "0.1"]),
    "space": (tiny_net, {"space": "torus"}, ValueError, ["space", "torus", "'ball', 'sphere'"]),
    "per": (tiny_net, {"per": "channel"}, ValueError, ["per", "channel", "'layer', 'filter'"]),
    "no rule": (tiny_net, {"rule": ""}, ValueError, ["rule", "''", "'mobius', 'riemannian'"]),
    "rule": (tiny_net, {"rule": "sgd"}, ValueError, ["rule", "sgd", "'mobius', 'riemannian'"]),
    "order": (tiny_net, {"order": "both"}, ValueError, ["order", "both", "'simultaneous', 'alternating'"]),
    "binarize": (tiny_net, {"binarize": "2/2"}, ValueError, ["binarize", "2/2", "'1/1'", "'1/32'"]),
    "start": (tiny_net, {"start": 1.5}, ValueError, ["start", "1.5"]),
    "start on the sphere": (tiny_net, {"space": "sphere", "start": 0.0}, ValueError, ["start", "sphere"]),
    "point_lr": (tiny_net, {"point_lr": -1.0}, ValueError, ["point_lr", "-1.0"]),
    "point_lr no number": (tiny_net, {"point_lr": "fast"}, TypeError, ["point_lr", "fast"]),
    "point_lr_power": (tiny_net, {"point_lr_power": -0.5}, ValueError, ["point_lr_power", "-0.5"]),
    "point_momentum": (tiny_net, {"point_momentum": 1.0}, ValueError, ["point_momentum", "below 1"]),
    "point_decay on the sphere": (
        tiny_net,
        {"space": "sphere", "point_decay": 0.1},
        ValueError,
        ["point_decay", "sphere"],
    ),
    "relative outside": (tiny_net, {"relative": True, "radius": 1.0}, ValueError, ["relative", "below 1", "1.0"]),
    "predicate that takes nothing": (
        tiny_net,
        {"where": by_name("layer9")},
        ValueError,
        [r"by_name\('layer9'\)", "2 IrConv"],
    ),
    "no weight": (
        tiny_net,
        {"where": by_class(nn.BatchNorm2d)},
        ValueError,
        [r"bn1 \(BatchNorm2d\)", r"bn2 .*no single weight of two dimensions"],
    ),
    "no parameters": (
        lambda: nn.Sequential(nn.ReLU()),
        {"where": by_class(nn.ReLU)},
        ValueError,
        [r"0 \(ReLU\)", "no parameter itself"],
    ),
    "integer": (
        lambda: with_weight(torch.ones(6, 5, 3, 3, dtype=torch.int8), requires_grad=False),
        {},
        ValueError,
        ["conv2", "int8", "floating"],
    ),
    "complex": (
        lambda: with_weight(torch.ones(6, 5, 3, 3, dtype=torch.cfloat)),
        {},
        ValueError,
        ["conv2", "complex64", "floating"],
    ),
    "empty": (
        lambda: with_weight(torch.ones(0, 5, 3, 3)),
        {},
        ValueError,
        ["conv2", r"empty \(shape \(0, 5, 3, 3\)\)"],
    ),
    "meta": (meta_net, {}, ValueError, ["conv1", "conv2", "meta device; materialize"]),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3)),
        {"where": by_name("0")},
        ValueError,
        ["0 ", "not initialized", "run the lazy"],
    ),
    "NaN": (nan_net, {}, ValueError, [r"conv1 .* 1 non-finite", r"conv2 .* 9 non-finite", "re-initialize"]),
    "zero on the sphere": (zero_filter, {"space": "sphere"}, ValueError, ["conv2", "1 of its filters are zero"]),
    "applied before": (applied, {}, ValueError, ["conv1", "conv2", "called on it before", r"fuse\(model\)"]),
    "parametrized": (parametrized, {}, ValueError, ["conv2", "already parametrized by _WeightNorm", "remove"]),
    "parametrized of old": (spectral_norm, {}, ValueError, ["conv1", "parametrized by spectral_norm or prune"]),
    "momentum beside Adam's": (
        tiny_net,
        {"rule": "riemannian-adam", "point_momentum": 0.9},
        ValueError,
        ["momentum of its own"],
    ),
    "relative": (tiny_net, {"relative": "no"}, TypeError, ["relative must be True or False"]),
    "string": (tiny_net, {"where": "conv"}, TypeError, ["where must be callable"]),
    "class": (tiny_net, {"where": nn.Conv2d}, TypeError, [r"by_class\(Conv2d\), not the class"]),
    "DataParallel": (
        lambda: DataParallel(tiny_net()),
        {"mode": "parametrize"},
        ValueError,
        ["DataParallel", "apply first, wrap", "mode='inplace'"],
    ),
    "class without subclasses": (
        with_final_conv,
        {"mode": "parametrize"},
        ValueError,
        [r"conv2 \(FinalConv\): its class refuses to be subclassed.*'tag'", "mode='inplace'"],
    ),
    "string, binarized": (
        tiny_net,
        {"where": "conv1", "binarize": "1/1"},
        TypeError,
        ["where must be callable", "by_name"],
    ),
    "DataParallel inside": (
        lambda: nn.Sequential(DataParallel(tiny_net())),
        {"mode": "parametrize"},
        ValueError,
        ["0 is wrapped in DataParallel"],
    ),
}


@pytest.mark.parametrize("function", [hbnn_plugin.plan, hbnn_plugin.apply])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_changes(case: str, function: Callable[..., Any]) -> None:
    build, options, error, fragments = BAD[case]
    model = build()
    modules = [] if isinstance(model, dict) else list(model.modules())
    classes = [type(m) for m in modules]
    before = state(model) if modules and case not in ("meta", "lazy") else {}
    with pytest.raises(error) as caught:
        function(model, **options)
    assert type(caught.value) is error
    for fragment in fragments:
        caught.match(f"(?s){fragment}")
    assert len(str(caught.value)) < 700
    if modules:
        assert list(model.modules()) == modules
        assert [type(m) for m in modules] == classes
        if before:
            assert same_state(state(model), before)


@pytest.mark.usefixtures("one_rank")
def test_ddp_is_refused_around_a_parametrization_taken_in_place_and_works_afterwards() -> None:
    wrapped = DistributedDataParallel(tiny_net())
    with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel.*apply first, wrap"):
        hbnn_plugin.apply(wrapped, mode="parametrize")
    assert not clusters(wrapped)
    assert "because the model is wrapped in DistributedDataParallel" in repr(hbnn_plugin.plan(wrapped))
    inside = hbnn_plugin.apply(wrapped)
    reference = applied(mode="inplace")
    train(reference, SGD(reference.parameters(), lr=0.1), 2)
    train(inside, SGD(inside.parameters(), lr=0.1), 2)
    assert same_state(state(inside.module), state(reference))
    reference, net = applied(), applied()
    parallel = DistributedDataParallel(net)
    train(reference, SGD(reference.parameters(), lr=0.1), 2)
    train(parallel, SGD(parallel.parameters(), lr=0.1), 2)
    assert same_state(state(net), state(reference))
    assert hbnn_plugin.flip_ratio(parallel).total == hbnn_plugin.flip_ratio(reference).total


@pytest.mark.parametrize("function", [hbnn_plugin.fuse, hbnn_plugin.flip_ratio, hbnn_plugin.cluster_report])
def test_a_model_that_was_never_applied_is_named(function: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"TinyNet has no exponential parametrization: call hbnn_plugin.apply\(model\) first"
    ):
        function(tiny_net())
    with pytest.raises(ValueError, match="TinyNet has no exponential parametrization"):
        function(hbnn_plugin.fuse(applied()))
