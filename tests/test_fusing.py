"""fuse gives back the plain host, which convolves with the very weights that were trained."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD

import hbnn_plugin
from tiny_hosts import IrConv, clusters, same_state, state, tiny_net, train
from training_helpers import Doubled, applied, each_geometry, each_host, output, trained


@each_geometry
@each_host
def test_fuse_gives_back_the_host(host: Any, options: dict[str, Any]) -> None:
    net, plain = tiny_net(host), tiny_net(host)
    identities = {name: id(p) for name, p in net.named_parameters()}
    hbnn_plugin.apply(net, **options)
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 2)
    expected = output(net)
    latent = {name: epc.parameter.detach().clone() for name, epc in clusters(net).items()}
    assert hbnn_plugin.fuse(net) is net
    assert torch.equal(output(net), expected)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert {name: id(p) for name, p in net.named_parameters()} == identities
    weight = next(p for p in net.conv1.parameters() if p.ndim > 1)
    assert weight.shape == latent["conv1"].shape
    assert not torch.equal(weight, latent["conv1"])
    for module, other in zip(net.modules(), plain.modules()):
        for hooks in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_pre_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(other, hooks))
    plain.load_state_dict(net.state_dict())
    assert torch.equal(output(plain), expected)
    torch.save(net, io.BytesIO())
    net.train()
    train(net, optimizer, 1)  # the optimizer trains on, as a plain host's would
    assert not torch.equal(output(net), expected)


def test_the_gradient_of_a_latent_is_not_taken_for_the_weights() -> None:
    net = trained()
    assert net.conv1.parametrizations.weight.original.grad is not None
    assert hbnn_plugin.fuse(net).conv1.weight.grad is None


def test_apply_after_torchs_remove_parametrizations() -> None:
    net = applied()
    for layer in (net.conv1, net.conv2):
        parametrize.remove_parametrizations(layer, "weight")
    hbnn_plugin.apply(net)
    assert list(clusters(net)) == ["conv1", "conv2"]


@pytest.mark.parametrize("mode", ["parametrize", "inplace"])
def test_other_parameters_may_be_assigned_whatever_class_the_layer_is_given(mode: str) -> None:
    net = applied(mode=mode)
    net.conv1.__class__ = type("Sharded", (type(net.conv1),), {})  # as FSDP2 does
    bias = nn.Parameter(torch.zeros(5))
    net.conv1.bias = bias
    assert net.conv1.bias is bias


@each_host
def test_fusing_a_copy_leaves_the_original_working(host: Any) -> None:
    net, reference = trained(host), trained(host)
    before = state(net)
    fused = hbnn_plugin.fuse(copy.deepcopy(net))
    assert torch.equal(output(fused), output(net))
    assert same_state(state(net), before)
    for model in (net, reference):
        model.train()
        train(model, SGD(model.parameters(), lr=0.1), 2, first=2)
    assert same_state(state(net), state(reference))
    assert not clusters(fused)
    hbnn_plugin.fuse(net)
    assert not torch.equal(output(net), output(fused))
    assert torch.equal(output(fused), output(trained(host)))


def test_a_model_fused_whole_that_was_applied_in_part_is_plain_in_every_part() -> None:
    model = nn.Sequential(tiny_net(), nn.Identity())
    hbnn_plugin.apply(model[0])
    hbnn_plugin.fuse(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class AlphaFirst(IrConv):
    """Its parameters: alpha, weight, bias, beta."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight, bias = self._parameters.pop("weight"), self._parameters.pop("bias")
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight, self.bias = weight, bias
        self.beta = nn.Parameter(torch.ones(1))


def test_parameters_come_back_in_their_order() -> None:
    net = tiny_net(AlphaFirst)
    names = [name for name, _ in net.named_parameters()]
    assert names.index("conv1.alpha") < names.index("conv1.weight") < names.index("conv1.beta")
    hbnn_plugin.apply(net, mode="parametrize")
    assert [name for name, _ in hbnn_plugin.fuse(copy.deepcopy(net)).named_parameters()] == names


def test_a_fused_model_can_be_applied_again() -> None:
    net = trained()
    expected = output(net)
    hbnn_plugin.apply(hbnn_plugin.fuse(net), space="sphere")
    assert torch.equal(output(net), expected)
    assert hbnn_plugin.flip_ratio(net).total == 0


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_somebody_elses_parametrization_of_the_bias_stays(first: str) -> None:
    net = tiny_net()
    bias = net.conv1.bias.detach().clone()
    if first == "theirs":
        parametrize.register_parametrization(net.conv1, "bias", Doubled())
    hbnn_plugin.apply(net)
    if first == "ours":
        parametrize.register_parametrization(net.conv1, "bias", Doubled())
    train(net, SGD(net.parameters(), lr=0.1), 2)
    expected = output(net)
    other = copy.deepcopy(net)
    hbnn_plugin.fuse(net)
    assert torch.equal(output(net), expected)
    assert torch.equal(output(other), expected)
    assert parametrize.is_parametrized(net.conv1, "bias")
    assert not parametrize.is_parametrized(net.conv1, "weight")
    assert not torch.equal(net.conv1.bias, bias)
    net.conv1.bias = bias
    assert torch.equal(net.conv1.bias, bias)
    parametrize.remove_parametrizations(net.conv1, "bias")
    assert type(net.conv1) is IrConv
    assert torch.equal(net.conv1.bias, bias)
    train(other.train(), SGD(other.parameters(), lr=0.1), 1)


def test_fuse_refuses_a_weight_that_is_not_finite() -> None:
    net = trained()
    clusters(net)["conv2"].parameter.data[1, 0, 0, 0] = torch.nan
    before, classes = state(net), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"conv2: its weight holds 45 non-finite value\(s\); nothing was fused"):
        hbnn_plugin.fuse(net)
    assert same_state(state(net), before)
    assert [type(m) for m in net.modules()] == classes


def test_a_fused_models_points_are_stepped_by_nobody() -> None:
    net = applied()
    epcs = clusters(net)
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 1)
    before = {name: epc.point.clone() for name, epc in epcs.items()}
    hbnn_plugin.fuse(net)
    train(net, optimizer, 1)
    assert all(torch.equal(epc.point, before[name]) for name, epc in epcs.items())
    with pytest.raises(ValueError, match="has no exponential parametrization"):
        hbnn_plugin.flip_ratio(net)
