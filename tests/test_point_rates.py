"""How far points move: with a power of their weights' learning rate, and under an optimizer of Adam's kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from tiny_hosts import (
    BINARY_LAYERS,
    IrConv,
    loss_of,
    points,
    tiny_net,
    train,
    twin,
)
from training_helpers import F64, applied, each_mode, one_step


@each_mode
@pytest.mark.parametrize("channels", [2, 8, 512])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
@pytest.mark.parametrize("rule", ["mobius", "spectral"])
def test_under_adam_the_coordinates_of_a_point_move_by_about_the_rate(
    rule: str, optimizer_class: type[Optimizer], channels: int, mode: str
) -> None:
    torch.manual_seed(0)
    options = {"rule": rule, "point_lr": 1.0, "mode": mode}
    layer = hbnn_plugin.apply(IrConv(channels, 3, 3), where=hbnn_plugin.by_class(IrConv), **options)
    optimizer = optimizer_class(layer.parameters(), lr=1e-3)
    (1e-3 * layer(torch.randn(2, channels, 5, 5)).square().mean()).backward()
    optimizer.step()
    (point,) = points(layer).values()
    rate = point.square().mean((1, 2, 3)).sqrt() / 1e-3
    assert rate.min() > 0.7, rate
    assert rate.max() < 1.4, rate


@each_mode
def test_adam_may_follow_another_optimizer(mode: str) -> None:
    torch.manual_seed(0)
    net = hbnn_plugin.apply(tiny_net(IrConv), rule="mobius", point_lr=1.0, mode=mode)
    train(net, SGD(net.parameters(), lr=0.01), 20)
    before = points(net)
    train(net, Adam(net.parameters(), lr=1e-4), 1, first=20)
    for name, point in points(net).items():
        rate = (point - before[name]).square().mean((1, 2, 3)).sqrt() / 1e-4
        assert rate.min() > 0.7, rate
        assert rate.max() < 1.4, rate


@each_mode
def test_each_points_rate_is_that_of_its_weights_group_times_point_lr(mode: str) -> None:
    net = applied(rule="mobius", point_lr=0.5, mode=mode)
    loss_of(net, 0).backward()
    slow, fast, halted = (twin(net) for _ in range(3))
    SGD(slow.parameters(), lr=0.02).step()
    SGD(fast.parameters(), lr=0.6).step()
    SGD(halted.parameters(), lr=0.0).step()
    rest = [p for n, p in net.named_parameters() if not n.startswith("conv")]
    groups = [
        {"params": net.conv1.parameters(), "lr": 0.02},
        {"params": net.conv2.parameters(), "lr": 0.1, "point_lr": 3.0},
        {"params": rest},
    ]
    optimizer = SGD(groups, lr=5.0)
    optimizer.step()
    torch.testing.assert_close(points(net)["conv1"], points(slow)["conv1"], rtol=0, atol=0)
    torch.testing.assert_close(points(net)["conv2"], points(fast)["conv2"], rtol=1e-6, atol=1e-9)
    assert not any(p.any() for p in points(halted).values())


@each_mode
@pytest.mark.parametrize("rule", ["mobius", "riemannian", "spectral"])
def test_a_points_rate_goes_with_a_power_of_its_weights(rule: str, mode: str) -> None:
    root, linear = (
        applied(rule=rule, point_lr=point_lr, point_lr_power=power, dtype=F64, mode=mode)
        for point_lr, power in ((0.5, 0.5), (2.5, 1.0))
    )
    for net in (root, linear):
        loss_of(net, 0).backward()
        SGD(net.parameters(), lr=0.04).step()  # 0.5 · √0.04 = 2.5 · 0.04
    for name in BINARY_LAYERS:
        assert points(root)[name].any()
        torch.testing.assert_close(points(root)[name], points(linear)[name], rtol=1e-12, atol=1e-15)


@each_mode
@pytest.mark.parametrize("rule", ["mobius", "spectral"])
@pytest.mark.parametrize("lr", [-3e-18, torch.tensor(-3e-18)])
def test_a_schedule_that_ends_a_rounding_below_zero(lr: float | torch.Tensor, rule: str, mode: str) -> None:
    net = applied(rule=rule, mode=mode)
    train(net, SGD(net.parameters(), lr=0.1), 1)
    before = points(net)
    optimizer = SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    train(net, optimizer, 1)
    for name, point in points(net).items():
        torch.testing.assert_close(point, before[name], rtol=0, atol=1e-9)


@each_mode
@pytest.mark.parametrize(("optimizer_class", "kind"), [(RMSprop, True), (Adagrad, True), (ASGD, False), (SGD, False)])
def test_which_optimizers_are_of_adams_kind(optimizer_class: type[Optimizer], kind: bool, mode: str) -> None:
    net = applied(rule="spectral", point_lr=1.0, mode=mode)
    optimizer = optimizer_class(net.parameters(), lr=1e-8)
    loss_of(net, 0).backward()
    optimizer.step()
    for point in points(net).values():
        rate = float(point.square().mean().sqrt()) / 1e-8
        assert (0.5 < rate < 1.5) == kind, rate


@each_mode
@pytest.mark.parametrize("shape", [(300, 140), (140, 300), (300, 300), (300, 20)])
def test_under_adam_the_points_of_large_layers_move_by_about_the_rate(shape: tuple[int, int], mode: str) -> None:
    torch.manual_seed(0)
    outputs, inputs = shape
    layer = IrConv(inputs, outputs, 1)
    hbnn_plugin.apply(layer, where=hbnn_plugin.by_class(IrConv), rule="spectral", point_lr=1.0, mode=mode)
    optimizer = Adam(layer.parameters(), lr=1e-3)
    layer(torch.randn(64, inputs, 3, 3)).square().mean().backward()
    optimizer.step()
    (point,) = points(layer).values()
    assert 0.5 < float(point.square().mean().sqrt()) / 1e-3 < 1.3


@each_mode
def test_a_tensor_as_learning_rate(mode: str) -> None:
    one, other = applied(mode=mode), applied(mode=mode)
    train(one, Adam(one.parameters(), lr=0.01), 2)
    train(other, Adam(other.parameters(), lr=torch.tensor(0.01), foreach=False), 2)
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(one)[name], points(other)[name])
        assert points(other)[name].any()


def test_maximize_turns_the_points_too() -> None:
    moved = []
    for maximize in (False, True):
        model = hbnn_plugin.apply(tiny_net())
        one_step(model, torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize))
        moved.append(find(model.conv1)["weight"].point)
    assert torch.allclose(moved[0], -moved[1], atol=1e-7)


@pytest.mark.parametrize("rule", ["spectral", "riemannian"])
def test_points_decay_under_maximize_too(rule: Any) -> None:
    model = hbnn_plugin.apply(tiny_net(), rule=rule, start=0.5, point_lr=1.0, point_momentum=0.0, point_decay=0.5)
    before = find(model.conv1)["weight"].point.norm()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(model.parameters(), lr=0.25, maximize=True).step()
    assert 0.5 * before < find(model.conv1)["weight"].point.norm() < 0.95 * before


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam]
)
def test_points_keep_pace_under_every_optimizer_that_normalizes(optimizer_class: type[torch.optim.Optimizer]) -> None:
    for scale in (1e-4, 1.0):
        model = hbnn_plugin.apply(tiny_net(), rule="mobius")
        one_step(model, optimizer_class(model.parameters(), lr=1e-3), scale)  # type: ignore[call-arg]
        rms = find(model.conv1)["weight"].point.square().mean().sqrt()
        assert 5e-4 < float(rms) < 2e-2, (scale, rms)


def test_an_optimizer_without_a_learning_rate_is_told_so() -> None:
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params: object) -> None:
            super().__init__(params, {})  # type: ignore[arg-type]

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            pass

    model = hbnn_plugin.apply(tiny_net())
    with pytest.raises(RuntimeError, match=r"conv[12]: its weight's parameter group has no learning rate 'lr'"):
        one_step(model, NoRate(model.parameters()))
