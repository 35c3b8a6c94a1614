"""Optimizers that fire no step hooks: reported, and mended by step_points."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hbnn_plugin
from idiom_hosts import CentredConv, ClippedConv
from tiny_hosts import BINARY_LAYERS, batch, loss_of, points, same_state, state, tiny_net, train
from training_helpers import applied, steps


class BareSgd(Optimizer):
    """Skips super().__init__()."""

    def __init__(self, params: Any, lr: float) -> None:
        self.defaults = {"lr": lr}
        self.state = defaultdict(dict)
        self.param_groups = [{"params": list(params), "lr": lr}]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(self.param_groups[0]["lr"] * p.grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


def test_an_optimizer_without_hooks_is_reported_once_a_layer() -> None:
    net = applied()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, BareSgd(net.parameters(), lr=0.1), 8)
    messages = [str(w.message) for w in caught]
    assert [m.split(":")[0] for m in messages] == list(BINARY_LAYERS)
    assert all("step_points" in m and "ClusterSGD" in m for m in messages)
    assert steps(net) == [0, 0]


def test_in_place_an_optimizer_without_hooks_trains_the_weight_alone() -> None:
    net, bare = applied(mode="inplace"), tiny_net()
    for model in (net, bare):
        train(model, BareSgd(model.parameters(), lr=0.1), 2)
    for mine, other in zip(net.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert steps(net) == [0, 0]
    assert not any(bool(point.any()) for point in points(net).values())


@pytest.mark.parametrize("host", [ClippedConv, CentredConv])
def test_what_a_forward_does_to_its_weight_is_no_step(host: Any) -> None:
    net = hbnn_plugin.apply(tiny_net(host), mode="inplace")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(8):  # micro-batches before the first step
            loss_of(net, seed).backward()


@pytest.mark.parametrize("rule", ["spectral", "fixed"])
def test_in_place_it_is_reported_once_a_layer_too(rule: str) -> None:
    net = applied(mode="inplace", rule=rule)
    twin = copy.deepcopy(net)
    for model in (net, twin):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, BareSgd(model.parameters(), lr=0.1), 8)
        messages = [str(w.message) for w in caught]
        assert [m.split(":")[0] for m in messages] == list(BINARY_LAYERS)
        assert all("super().__init__()" in m and "ClusterSGD" in m for m in messages)


def test_in_place_nothing_watches_any_longer_once_an_optimizer_has_stepped() -> None:
    net = applied(mode="inplace")
    copied = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (net, copied):
            train(model, SGD(model.parameters(), lr=0.1), 5)
            assert not any(module._forward_pre_hooks for module in (model.conv1, model.conv2))
    fused = hbnn_plugin.fuse(applied(mode="inplace"))
    assert not any(module._forward_pre_hooks for module in (fused.conv1, fused.conv2))


def test_a_cluster_optimizer_in_place_is_no_such_optimizer() -> None:
    net = applied(mode="inplace", rule="fixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, hbnn_plugin.ClusterSGD(net.parameters(), lr=0.1), 8)


def test_step_points_steps_for_an_optimizer_without_hooks() -> None:
    net, reference = applied(), applied()
    train(reference, SGD(reference.parameters(), lr=0.1), 5)
    optimizer = BareSgd(net.parameters(), lr=0.1)
    for seed in range(5):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        hbnn_plugin.step_points(optimizer)
        optimizer.step()
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(net)[name], points(reference)[name])


def test_step_points_is_refused_where_points_move_by_themselves_or_there_are_none() -> None:
    net = applied()
    optimizer = SGD(net.parameters(), lr=0.1)
    loss_of(net).backward()
    with pytest.raises(ValueError, match=r"SGD fires torch's step hooks.*leave step_points out"):
        hbnn_plugin.step_points(optimizer)
    with pytest.raises(ValueError, match=r"BareSgd holds no latent weight.*hbnn_plugin\.apply"):
        hbnn_plugin.step_points(BareSgd([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    assert steps(net) == [0, 0]


def test_no_report_where_points_are_fixed() -> None:
    net = applied(rule="fixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, BareSgd(net.parameters(), lr=0.1), 8)


def test_step_points_is_refused_in_place_with_the_mend() -> None:
    """There the optimizer's step itself has to be framed."""
    net = applied(mode="inplace")
    loss_of(net).backward()
    before = state(net)
    with pytest.raises(ValueError, match=r"conv1 is in in-place mode.*BareSgd call super.*mode='parametrize'"):
        hbnn_plugin.step_points(BareSgd(net.parameters(), lr=0.1))
    assert same_state(state(net), before)


def test_no_such_report_for_an_averaged_teacher_in_training_mode() -> None:
    student = applied()
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5)).train()
    optimizer = SGD(student.parameters(), lr=0.1)
    for seed in range(8):
        train(student, optimizer, 1, first=seed)
        teacher.update_parameters(student)
        with torch.no_grad():
            teacher(batch(seed)[0])
