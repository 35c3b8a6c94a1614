"""What goes wrong in trainings: gradients that are not finite, steps to the edge, hosts and optimizers that change."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

import hbnn_plugin
from hbnn_plugin import by_name, cluster_report, flip_ratio
from inplace_nets import agree, mapped, smooth
from tiny_hosts import (
    BINARY_LAYERS,
    IrConv,
    SmoothConv,
    TinyNet,
    batch,
    clusters,
    latents,
    loss_of,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import F64, applied, each_mode, moved, steps

each_rule = pytest.mark.parametrize("rule", ["mobius", "riemannian", "riemannian-adam", "spectral"])
each_optimizer = pytest.mark.parametrize("optimizer_class", [SGD, Adam])


# -- gradients that are not finite -------------------------------------------------------------------------------------


@each_mode
@each_rule
@each_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_outlast_several_steps_of_gradients_that_are_not_finite(
    value: float, optimizer_class: type[Optimizer], rule: str, mode: str
) -> None:
    """The latents become what the bare host's weights would. With good ones loaded everything trains again."""
    net = applied(rule=rule, mode=mode)
    optimizer = optimizer_class(net.parameters(), lr=0.01)
    train(net, optimizer, 2)
    kept, good = points(net), copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        for p in net.parameters():
            p.grad.fill_(value)
        optimizer.step()
    assert moved(net, kept) == []
    assert steps(net) == [2, 2]
    for epc in clusters(net).values():
        assert all(b.isfinite().all() for b in (epc.point, epc.mean_square, epc.momentum) if b is not None)
        assert not epc.parameter.isfinite().any()
    with pytest.raises(ValueError, match="non-finite"):
        hbnn_plugin.fuse(net)
    net.load_state_dict(good["net"])
    optimizer.load_state_dict(good["optimizer"])
    train(net, optimizer, 1, first=2)
    assert moved(net, kept) == list(BINARY_LAYERS)
    assert all(p.isfinite().all() for p in net.parameters())


@each_mode
@pytest.mark.parametrize("rule", ["mobius", "spectral"])
@pytest.mark.parametrize("per", ["filter", "layer"])
def test_only_the_filters_concerned_hold_still(per: str, rule: str, mode: str) -> None:
    net, reference = (smooth(mode, per=per, radius=0.05, rule=rule) for _ in range(2))
    for seed in range(3):
        reference.zero_grad()
        loss_of(reference, seed).backward()
        for mine, theirs in zip(net.parameters(), reference.parameters()):
            mine.grad = theirs.grad.clone()
        clusters(net)["conv1"].parameter.grad[2, 0, 1, 1] = math.nan
        for one in (net, reference):
            SGD(one.parameters(), lr=0.1).step()
    still = [2] if per == "filter" else list(range(5))
    lost = still if mode == "inplace" else [2]  # there the gradient passes through the map first
    for i in range(5):
        if rule == "mobius":  # a spectral point's direction depends on the layer's other gradients
            mine, theirs = points(net)["conv1"][i], points(reference)["conv1"][i]
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=0) is (i not in still)  # some CPUs round otherwise
        assert points(net)["conv1"][i].isfinite().all()
        assert bool(points(net)["conv1"][i].any()) is (i not in still)
        assert bool(latents(net)["conv1"][i].isfinite().all()) is (i not in lost)
    assert torch.equal(points(net)["conv2"], points(reference)["conv2"])


# -- steps to the edge -------------------------------------------------------------------------------------------------


@each_mode
@each_rule
@pytest.mark.parametrize("options", [{}, {"per": "layer"}, {"relative": True}, {"space": "sphere"}], ids=str)
@each_optimizer
def test_a_huge_rate_leaves_points_and_weights_inside_and_is_reported(
    optimizer_class: type[Optimizer], options: dict[str, Any], rule: str, mode: str
) -> None:
    net = applied(rule=rule, mode=mode, **options)
    optimizer = optimizer_class(net.parameters(), lr=1e6)
    train(net, optimizer, 3)
    on_sphere = options.get("space") == "sphere"
    for name, epc in clusters(net).items():
        reach = epc.reach()
        w = epc.logical(net.get_submodule(name).weight.detach()).double()
        root = epc.radius**0.5
        weight_reach = root * w.square().sum(epc.dims, keepdim=True).sqrt()
        assert reach.isfinite().all() and weight_reach.isfinite().all()
        assert all(b.isfinite().all() for b in (epc.mean_square, epc.momentum) if b is not None)
        if on_sphere:
            for r in (reach, weight_reach):
                torch.testing.assert_close(r, torch.ones_like(r), rtol=1e-4, atol=0)
        else:
            assert float(reach.max()) <= 1 - 1e-3 + 1e-6 and float(weight_reach.max()) <= 1 + 1e-6
            assert float(reach.max()) > 0.5, "nothing was pushed anywhere"
        layer = cluster_report(net)[name]
        assert layer.reach == pytest.approx(float(reach.max()))
        assert layer.steps >= 1  # a latent so far out may keep its point from moving on
    assert f"{cluster_report(net)['conv1'].reach:.4f}" in repr(cluster_report(net))
    train(net, optimizer_class(net.parameters(), lr=1e-3), 2)
    assert all(p.isfinite().all() for p in points(net).values())
    assert all(bits.isfinite().all() for bits in latents(net).values())


# -- hosts that change -------------------------------------------------------------------------------------------------


def test_a_weight_that_the_host_replaces_trains_the_same_in_both_modes() -> None:
    """In place by another Parameter too; under a parametrization by a tensor, such as an initialization's."""
    fresh = tiny_net(SmoothConv, seed=3, dtype=F64).conv1.weight.detach()
    nets = []
    for mode, make in (("inplace", nn.Parameter), ("parametrize", torch.Tensor.clone)):
        net = smooth(mode)
        train(net, SGD(net.parameters(), lr=0.1), 2)
        net.conv1.weight = make(fresh.clone())
        torch.testing.assert_close(net.conv1.weight.detach(), fresh)
        train(net, SGD(net.parameters(), lr=0.1), 2, first=2)
        assert steps(net) == [4, 4]
        nets.append(net)
    assert agree(*nets)


def test_under_a_parametrization_another_parameter_is_refused_with_the_mend() -> None:
    net = smooth("parametrize")
    before, latent = state(net), clusters(net)["conv1"].parameter
    with pytest.raises(ValueError, match=r"conv1: its weight is computed .*assign a plain tensor.* mode='inplace'"):
        net.conv1.weight = nn.Parameter(torch.zeros_like(net.conv1.weight))
    assert same_state(state(net), before) and clusters(net)["conv1"].parameter is latent
    net.conv1.bias = nn.Parameter(torch.ones_like(net.conv1.bias))
    net.conv1.register_parameter("another", nn.Parameter(torch.ones(1)))
    assert [p.numel() for p in net.conv1.parameters()] == [5, 1, 180]
    hbnn_plugin.fuse(net).conv1.weight = nn.Parameter(torch.zeros(5, 4, 3, 3, dtype=F64))
    assert not net.conv1.weight.any()


@each_mode
def test_a_layer_that_the_host_replaces_is_plain_and_the_rest_goes_on(mode: str) -> None:
    net, bare = smooth(mode), tiny_net(SmoothConv, dtype=F64)
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 2)
    old, before = net.conv1, points(net)["conv1"]
    net.conv1 = copy.deepcopy(bare.conv1)
    train(net, optimizer, 1, first=2)
    (left,) = clusters(old).values()
    assert torch.equal(left.point, before), "its weight had no gradient"
    assert torch.equal(net.conv1.weight, bare.conv1.weight), "nobody trains it"
    assert steps(net) == [3]
    assert list(flip_ratio(net)) == list(cluster_report(net)) == ["conv2"]
    rest = copy.deepcopy(net.conv2)
    with pytest.warns(UserWarning, match="^conv1: .*two-valued"):
        hbnn_plugin.apply(net, where=by_name("conv1"), mode=mode, radius=0.5)
    start = points(net)
    train(net, SGD(net.parameters(), lr=0.1), 1, first=3)
    assert moved(net, start) == list(BINARY_LAYERS) and steps(net) == [1, 4]
    assert not torch.equal(rest.weight, net.conv2.weight)
    keys = list(tiny_net(SmoothConv).state_dict())
    assert sorted(hbnn_plugin.fuse(net).state_dict()) == sorted(keys)


# -- optimizers that change --------------------------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("how", ["rebuilt without it", "taken out of its group"])
def test_a_layer_that_the_optimizer_drops_holds_still_and_may_come_back(how: str, mode: str) -> None:
    net = smooth(mode)
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 2)
    dropped = clusters(net)["conv1"].parameter
    if how == "rebuilt without it":
        optimizer = SGD([p for p in net.parameters() if p is not dropped], lr=0.1)
    else:
        held = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [p for p in held if p is not dropped]
    before, weight = {**points(net), "v": latents(net)["conv1"]}, net.conv1.weight.detach().clone()
    for seed in range(2, 4):
        train(net, optimizer, 1, first=seed)
        net.zero_grad()  # which the optimizer does no more
    assert torch.equal(points(net)["conv1"], before["conv1"]) and torch.equal(latents(net)["conv1"], before["v"])
    assert torch.equal(net.conv1.weight, weight)
    assert steps(net) == [2, 4]
    optimizer.add_param_group({"params": [dropped]})
    train(net, optimizer, 1, first=4)
    assert not torch.equal(points(net)["conv1"], before["conv1"]) and steps(net) == [3, 5]
    if mode == "inplace":
        assert mapped(net)


@each_mode
def test_a_hook_that_clears_gradients_that_are_not_finite_loses_no_more_than_those_steps(mode: str) -> None:
    """As training scripts do that skip a bad batch."""
    net, reference = applied(IrConv, mode=mode), applied(IrConv, mode=mode)
    optimizer, other = (SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (net, reference))
    for seed in range(6):
        optimizer.zero_grad()
        loss = loss_of(net, seed)
        (loss * (math.nan if seed in (1, 2, 3) else 1.0)).backward()
        if not all(p.grad.isfinite().all() for p in net.parameters()):
            continue
        optimizer.step()
    for seed in (0, 4, 5):
        train(reference, other, 1, first=seed)
    statistics = ("running_mean", "running_var", "num_batches_tracked")  # which have seen the bad batches too
    ours, theirs = ({k: v for k, v in state(n).items() if not k.endswith(statistics)} for n in (net, reference))
    assert same_state(ours, theirs)
    assert isinstance(net, TinyNet) and net(batch()[0]).isfinite().all()
