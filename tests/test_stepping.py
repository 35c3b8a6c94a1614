"""Points step with whatever steps their latents, once, and never otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import hbnn_plugin
from hbnn_plugin.optimizer.recovery import recover
from inplace_nets import agree, smooth
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
    SmoothConv,
    clusters,
    latents,
    loss_of,
    points,
    same_state,
    state,
    tiny_net,
    train,
    twin,
)
from training_helpers import F64, OPTIMIZERS, applied, each_mode, equal, moved, oracle, points_of, steps

# -- what a step is, from geoopt's formulas --------


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("per", ["filter", "layer"])
def test_a_step_is_equation_9_at_the_recovered_gradient(per: str, order: str) -> None:
    net = applied(SmoothConv, dtype=F64, rule="mobius", per=per, order=order, radius=0.2)
    optimizer = SGD(net.parameters(), lr=0.3)
    train(net, optimizer, 3)  # away from p = 0
    assert all(p.norm() > 1e-3 for p in points(net).values())
    expected_points, expected_latents = oracle(net, 7, 0.3, 0.2, per, order)
    train(net, optimizer, 1, first=7)
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(net)[name], expected_points[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(latents(net)[name], expected_latents[name], rtol=1e-9, atol=1e-12)


def test_the_two_orders_differ_in_the_latents_only() -> None:
    one, other = (applied(SmoothConv, dtype=F64, radius=0.2, order=o) for o in ("simultaneous", "alternating"))
    for net in (one, other):
        train(net, SGD(net.parameters(), lr=1.0), 1)
    torch.testing.assert_close(points(one), points(other), rtol=1e-12, atol=1e-15)
    gap = max(float((latents(one)[n] - latents(other)[n]).norm()) for n in BINARY_LAYERS)
    assert gap > 1e-6


# -- when the optimizer is built, and which --------


@each_mode
@pytest.mark.parametrize("kind", ["before", "rebuilt"])
def test_it_does_not_matter_when_the_optimizer_is_built(kind: str, mode: str) -> None:
    reference = applied(mode=mode)
    train(reference, SGD(reference.parameters(), lr=0.1, weight_decay=1e-3), 4)
    net = tiny_net()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1e-3)
    hbnn_plugin.apply(net, mode=mode)
    train(net, optimizer, 2)
    if kind == "rebuilt":
        optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1e-3)
    train(net, optimizer, 2, first=2)
    assert same_state(state(net), state(reference))
    assert steps(net) == [4, 4]


@each_mode
def test_an_optimizer_of_adam_keeps_its_state_over_apply(mode: str) -> None:
    """Built and used before apply: the latent keeps its identity, its shape, its place."""
    net = tiny_net(HardBinaryConv)
    optimizer = Adam(net.parameters(), lr=0.01)
    train(net, optimizer, 2)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    hbnn_plugin.apply(net, mode=mode)
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    train(net, optimizer, 2, first=2)
    assert steps(net) == [2, 2]


@each_mode
@pytest.mark.parametrize("variant", ["foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_and_fused_step_the_points_as_the_plain_loop_does(name: str, variant: str, mode: str) -> None:
    nets = []
    for options in ({"foreach": False}, {variant: True}):
        net = applied(SmoothConv, dtype=F64, mode=mode)
        train(net, OPTIMIZERS[name](net.parameters(), **options), 4)
        nets.append(net)
    one, other = map(points, nets)
    for layer in BINARY_LAYERS:
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-7, atol=1e-11)
        assert one[layer].flatten(1).norm(dim=1).min() > 0
    assert steps(nets[1]) == [4, 4]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_the_same_steps_in_both_modes(name: str) -> None:
    one, other = smooth("inplace"), smooth("parametrize")
    for net in (one, other):
        train(net, OPTIMIZERS[name](net.parameters()), 4)
    assert agree(one, other)
    assert not agree(one, smooth("inplace"))


# -- what is done to gradients --------


@each_mode
@pytest.mark.parametrize("set_to_none", [False, True])
def test_accumulated_gradients_are_the_gradient_of_the_sum(set_to_none: bool, mode: str) -> None:
    one, other = (applied(SmoothConv, dtype=F64, mode=mode).eval() for _ in range(2))
    optimizers = [SGD(net.parameters(), lr=0.1) for net in (one, other)]
    for round_ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        (loss_of(one, round_) + loss_of(one, round_ + 5)).backward()
        loss_of(other, round_).backward()
        loss_of(other, round_ + 5).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert agree(one, other)
    assert steps(other) == [2, 2]


@each_mode
def test_a_clipped_gradient_moves_points_and_latents_by_what_is_left_of_it(mode: str) -> None:
    """The norm is over what parameters() hold: latents' gradients under a parametrization, weights' in place."""
    net = smooth(mode)
    train(net, SGD(net.parameters(), lr=0.1), 2)
    net.zero_grad()
    loss_of(net, 3).backward()
    by_hand, untouched = twin(net), twin(net)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    assert norm > 0.02, "nothing was clipped"
    for p in by_hand.parameters():
        p.grad.mul_(0.01 / (norm + 1e-6))
    for model in (net, by_hand, untouched):
        SGD(model.parameters(), lr=0.1).step()
    assert agree(net, by_hand)
    assert not agree(net, untouched)


def test_points_are_neither_parameters_nor_part_of_the_gradient_norm() -> None:
    plain, net = tiny_net(), applied(SmoothConv, dtype=F64)
    assert len(list(net.parameters())) == len(list(plain.parameters()))
    assert not any("point" in name for name, _ in net.named_parameters())
    train(net, SGD(net.parameters(), lr=0.1), 2)
    loss_of(net, 3).backward()
    epcs = list(clusters(net).values())
    before = [found.gradient for found in recover(epcs, [epc.parameter.grad for epc in epcs])]
    by_hand = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    torch.testing.assert_close(norm, by_hand)
    assert norm > 0.02, "nothing was clipped"
    after = [found.gradient for found in recover(epcs, [epc.parameter.grad for epc in epcs])]
    for one, other in zip(before, after):
        assert one.norm() > 0
        torch.testing.assert_close(other, one * 0.01 / (norm + 1e-6), rtol=1e-9, atol=0)


@each_mode
@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
def test_a_nan_in_the_gradient_reaches_no_point(optimizer_class: type[Optimizer], mode: str) -> None:
    net = applied(mode=mode)
    optimizer = optimizer_class(net.parameters(), lr=0.1)
    train(net, optimizer, 1)
    loss_of(net, 1).backward()
    clusters(net)["conv1"].parameter.grad[2, 0, 1, 1] = torch.nan
    clusters(net)["conv1"].parameter.grad[4, 1, 1, 1] = torch.inf
    before = points(net)
    optimizer.step()
    after = points(net)
    changed = [not torch.equal(a, b) for a, b in zip(after["conv1"], before["conv1"])]
    assert changed == [True, True, False, True, False]
    assert all(p.isfinite().all() for p in after.values())
    assert moved(net, before) == list(BINARY_LAYERS)


@each_mode
def test_frozen_latents_keep_their_points(mode: str) -> None:
    net = applied(mode=mode)
    clusters(net)["conv1"].parameter.requires_grad_(False)
    before = state(net)
    train(net, SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), 3)
    assert moved(net, points_of(before)) == ["conv2"]
    assert torch.equal(net.conv1.weight, applied(mode=mode).conv1.weight)


@each_mode
@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.5, weight_decay=0.5, momentum=0.9), partial(AdamW, lr=0.1, weight_decay=1.0)]
)
def test_no_optimizer_decays_or_moves_a_point_by_itself(optimizer: Callable[..., Optimizer], mode: str) -> None:
    fixed = applied(rule="fixed", start=0.3, mode=mode)
    before = points(fixed)
    assert all(p.norm() > 0 for p in before.values())
    train(fixed, optimizer(fixed.parameters()), 3)
    assert moved(fixed, before) == []
    assert not torch.equal(fixed.conv1.weight, applied(rule="fixed", start=0.3, mode=mode).conv1.weight)
    net = applied(rule="mobius", start=0.3, mode=mode)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = points(net)
    latents_before = latents(net)
    optimizer(net.parameters()).step()
    assert moved(net, before) == []
    assert not equal(latents(net), latents_before), "weight decay did nothing at all"


@each_mode
def test_zeroed_gradients_move_no_point_and_missing_ones_neither(mode: str) -> None:
    net = applied(rule="mobius", mode=mode)  # without momentum
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 2)
    before = points(net)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert moved(net, before) == []
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert moved(net, before) == []


@pytest.mark.parametrize("rule", ["mobius", "spectral"])
def test_a_point_whose_gradient_the_map_squeezes_away_holds_still(rule: str) -> None:
    """√r‖v‖ = 9.5: of a gradient along v the map leaves less than float32 can tell."""
    net = applied(rule=rule)
    epc = clusters(net)["conv1"]
    with torch.no_grad():
        epc.parameter[0] *= 9.5 / 0.05**0.5 / epc.parameter[0].norm()
    train(net, SGD(net.parameters(), lr=0.1), 1)
    moved_points = epc.point.flatten(1).abs().amax(1) > 0
    assert moved_points.tolist() == [False, True, True, True, True]
