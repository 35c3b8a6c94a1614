"""Points step with whatever steps their latents, once, at their rate, and never otherwise."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hbnn_plugin
from hbnn_plugin.recovery import recover
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
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
    twin,
)

F64 = torch.float64


def applied(conv: Any = IrConv, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> TinyNet:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*two-valued")  # SmoothConv
        return hbnn_plugin.apply(tiny_net(conv, seed, dtype), **options)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def moved(net: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, p in points(net).items() if not torch.equal(p, before[name])]


def steps(net: nn.Module) -> list[int]:
    return [int(epc.steps) for epc in clusters(net).values()]


# -- what a step is, from geoopt's formulas --------


def rows(tensor: Tensor, per: str) -> Tensor:
    return tensor.reshape(1, -1) if per == "layer" else tensor.flatten(1)


def oracle(net: TinyNet, seed: int, lr: float, radius: float, per: str, order: str) -> tuple[dict[str, Tensor], ...]:
    """Points and latents after one SGD step, from autograd through geoopt's ball around the plain host."""
    plain = tiny_net(SmoothConv, 0, F64).train(net.training)
    plain.load_state_dict(hbnn_plugin.plain_state_dict(net.state_dict()))
    loss_of(plain, seed).backward()
    ball = geoopt.PoincareBall(c=torch.tensor(radius, dtype=F64))
    new_points, new_latents = {}, {}
    for name, epc in clusters(net).items():
        upstream = plain.get_submodule(name).weight.grad
        p = rows(epc.point.clone(), per).requires_grad_()
        v = rows(epc.latent.detach().clone(), per).requires_grad_()
        g_p, g_v = torch.autograd.grad(ball.expmap(p, v, project=False), (p, v), rows(upstream, per))
        p_new = ball.mobius_add(p, ball.mobius_scalar_mul(torch.tensor(-lr, dtype=F64), g_p), project=False).detach()
        if order == "alternating":
            g_v = torch.autograd.grad(ball.expmap(p_new, v, project=False), v, rows(upstream, per))[0]
        new_points[name] = p_new.reshape(epc.point.shape)
        new_latents[name] = (v.detach() - lr * g_v).reshape(epc.point.shape)
    return new_points, new_latents


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("per", ["filter", "layer"])
def test_a_step_is_equation_9_at_the_recovered_gradient(per: str, order: str) -> None:
    net = applied(SmoothConv, dtype=F64, per=per, order=order, radius=0.2)
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
    assert equal(points(one), points(other))
    gap = max(float((latents(one)[n] - latents(other)[n]).norm()) for n in BINARY_LAYERS)
    assert gap > 1e-6


# -- when the optimizer is built, and which --------


@pytest.mark.parametrize("kind", ["before", "rebuilt"])
def test_it_does_not_matter_when_the_optimizer_is_built(kind: str) -> None:
    reference = applied()
    train(reference, SGD(reference.parameters(), lr=0.1, weight_decay=1e-3), 4)
    net = tiny_net()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1e-3)
    hbnn_plugin.apply(net)
    train(net, optimizer, 2)
    if kind == "rebuilt":
        optimizer = SGD(net.parameters(), lr=0.1, weight_decay=1e-3)
    train(net, optimizer, 2, first=2)
    assert same_state(state(net), state(reference))
    assert steps(net) == [4, 4]


def test_an_optimizer_of_adam_keeps_its_state_over_apply() -> None:
    """Built and used before apply: the latent keeps its identity, its shape, its place."""
    net = tiny_net(HardBinaryConv)
    optimizer = Adam(net.parameters(), lr=0.01)
    train(net, optimizer, 2)
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    hbnn_plugin.apply(net)
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    train(net, optimizer, 2, first=2)
    assert steps(net) == [2, 2]


OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": partial(Adam, lr=0.01, weight_decay=1e-3),
    "adamw": partial(AdamW, lr=0.01),
}


@pytest.mark.parametrize("variant", ["foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_and_fused_step_the_points_as_the_plain_loop_does(name: str, variant: str) -> None:
    nets = []
    for options in ({"foreach": False}, {variant: True}):
        net = applied(SmoothConv, dtype=F64)
        train(net, OPTIMIZERS[name](net.parameters(), **options), 4)
        nets.append(net)
    one, other = map(points, nets)
    for layer in BINARY_LAYERS:
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-7, atol=1e-11)
        assert one[layer].flatten(1).norm(dim=1).min() > 0
    assert steps(nets[1]) == [4, 4]


@pytest.mark.parametrize("channels", [2, 8, 512])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_under_adam_the_coordinates_of_a_point_move_by_about_the_rate(
    optimizer_class: type[Optimizer], channels: int
) -> None:
    torch.manual_seed(0)
    layer = hbnn_plugin.apply(IrConv(channels, 3, 3), where=hbnn_plugin.by_class(IrConv))
    optimizer = optimizer_class(layer.parameters(), lr=1e-3)
    (1e-3 * layer(torch.randn(2, channels, 5, 5)).square().mean()).backward()
    optimizer.step()
    (point,) = points(layer).values()
    rate = point.square().mean((1, 2, 3)).sqrt() / 1e-3
    assert rate.min() > 0.7, rate
    assert rate.max() < 1.4, rate


# -- GradScaler --------


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_changes_nothing(name: str, fused: bool, order: str) -> None:
    reference, net = (applied(order=order) for _ in range(2))
    train(reference, OPTIMIZERS[name](reference.parameters(), fused=fused), 3)
    optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12
    for key, value in state(reference).items():
        torch.testing.assert_close(state(net)[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")
    assert all(p.norm() > 0 for p in points(net).values())


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_grad_scaler_skips_leaves_everything_as_it_was(name: str, fused: bool, order: str) -> None:
    net = applied(point_momentum=0.5, point_decay=0.1, order=order)
    optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def one_step(seed: int, *, overflow: bool) -> dict[str, Tensor]:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        if overflow:  # elsewhere: the latents' own gradients are finite
            net.fc.weight.grad[0, 0] = torch.inf
        before = state(net)
        scaler.step(optimizer)
        scaler.update()
        return before

    one_step(0, overflow=False)
    before = one_step(1, overflow=True)
    changed = [key for key, value in state(net).items() if not torch.equal(value, before[key])]
    assert changed == []
    one_step(2, overflow=False)
    assert moved(net, points_of(before)) == list(BINARY_LAYERS)


def points_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.split(".")[0]: value for key, value in state_dict.items() if key.endswith(".point")}


# -- what is done to gradients --------


@pytest.mark.parametrize("set_to_none", [False, True])
def test_accumulated_gradients_are_the_gradient_of_the_sum(set_to_none: bool) -> None:
    one, other = (applied(SmoothConv, dtype=F64).eval() for _ in range(2))
    optimizers = [SGD(net.parameters(), lr=0.1) for net in (one, other)]
    for round_ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        (loss_of(one, round_) + loss_of(one, round_ + 5)).backward()
        loss_of(other, round_).backward()
        loss_of(other, round_ + 5).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(one)[name], points(other)[name], rtol=1e-9, atol=1e-12)
    assert steps(other) == [2, 2]


def test_points_are_neither_parameters_nor_part_of_the_gradient_norm() -> None:
    plain, net = tiny_net(), applied(SmoothConv, dtype=F64)
    assert len(list(net.parameters())) == len(list(plain.parameters()))
    assert not any("point" in name for name, _ in net.named_parameters())
    train(net, SGD(net.parameters(), lr=0.1), 2)
    loss_of(net, 3).backward()
    epcs = list(clusters(net).values())
    before = [found.gradient for found in recover(epcs, [epc.latent.grad for epc in epcs])]
    by_hand = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    torch.testing.assert_close(norm, by_hand)
    assert norm > 0.02, "nothing was clipped"
    after = [found.gradient for found in recover(epcs, [epc.latent.grad for epc in epcs])]
    for one, other in zip(before, after):
        assert one.norm() > 0
        torch.testing.assert_close(other, one * 0.01 / (norm + 1e-6), rtol=1e-9, atol=0)


def test_a_nan_in_the_gradient_reaches_no_point() -> None:
    for optimizer_class in (SGD, Adam):
        net = applied()
        optimizer = optimizer_class(net.parameters(), lr=0.1)
        train(net, optimizer, 1)
        loss_of(net, 1).backward()
        clusters(net)["conv1"].latent.grad[2, 0, 1, 1] = torch.nan
        clusters(net)["conv1"].latent.grad[4, 1, 1, 1] = torch.inf
        before = points(net)
        optimizer.step()
        after = points(net)
        changed = [not torch.equal(a, b) for a, b in zip(after["conv1"], before["conv1"])]
        assert changed == [True, True, False, True, False]
        assert all(p.isfinite().all() for p in after.values())
        assert moved(net, before) == list(BINARY_LAYERS)


def test_frozen_latents_keep_their_points() -> None:
    net = applied()
    clusters(net)["conv1"].latent.requires_grad_(False)
    before = state(net)
    train(net, SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), 3)
    assert moved(net, points_of(before)) == ["conv2"]
    assert torch.equal(net.conv1.weight, applied().conv1.weight)


@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.5, weight_decay=0.5, momentum=0.9), partial(AdamW, lr=0.1, weight_decay=1.0)]
)
def test_no_optimizer_decays_or_moves_a_point_by_itself(optimizer: Callable[..., Optimizer]) -> None:
    fixed = applied(rule="fixed", start=0.3)
    before = points(fixed)
    assert all(p.norm() > 0 for p in before.values())
    train(fixed, optimizer(fixed.parameters()), 3)
    assert moved(fixed, before) == []
    assert not torch.equal(fixed.conv1.weight, applied(rule="fixed", start=0.3).conv1.weight)
    net = applied(start=0.3)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = points(net)
    latents_before = latents(net)
    optimizer(net.parameters()).step()
    assert moved(net, before) == []
    assert not equal(latents(net), latents_before), "weight decay did nothing at all"


def test_zeroed_gradients_move_no_point_and_missing_ones_neither() -> None:
    net = applied()
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, 2)
    before = points(net)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert moved(net, before) == []
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert moved(net, before) == []


# -- closures, nested and raising steps --------


def closure_of(net: nn.Module, optimizer: Optimizer, seed: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, seed)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures(name: str, as_keyword: bool, order: str) -> None:
    reference, net = (applied(order=order) for _ in range(2))
    train(reference, OPTIMIZERS[name](reference.parameters()), 3)
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(3):
        closure = closure_of(net, optimizer, seed)
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.ndim == 0
    assert same_state(state(net), state(reference))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_moves_each_point_once_a_step(line_search: str | None) -> None:
    net = applied(SmoothConv, dtype=F64)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)
    evaluations = []
    for seed in range(2):
        before = points(net)

        def closure(seed: int = seed, before: dict[str, Tensor] = before) -> Tensor:
            evaluations.append(moved(net, before))
            return closure_of(net, optimizer, seed)()

        optimizer.step(closure)
        assert moved(net, before) == list(BINARY_LAYERS)
        assert steps(net) == [seed + 1] * 2
    assert len(evaluations) > 4
    assert not any(evaluations), "a point moved in the middle of a step"
    assert all(value.isfinite().all() for value in state(net).values())


def test_alternating_refuses_optimizers_that_evaluate_their_closure_again() -> None:
    net = applied(order="alternating")
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
    with pytest.raises(RuntimeError, match=r"alternating.*LBFGS.*simultaneous"):
        optimizer.step(closure_of(net, optimizer, 0))


class Sam(Optimizer):
    """The public SAM implementation's way of doing it: one list of groups for itself and its base optimizer."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        with_gradients = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in with_gradients]).norm() + 1e-12
        for p in with_gradients:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [True, False])
def test_sam_moves_each_point_once(with_closure: bool, order: str) -> None:
    net = applied(order=order)
    optimizer = Sam(net.parameters(), SGD, lr=0.1, momentum=0.9)
    for seed in range(3):
        before = points(net)
        loss_of(net, seed).backward()
        if with_closure:
            optimizer.step(closure_of(net, optimizer, seed))
        else:
            optimizer.first_step(zero_grad=True)
            assert moved(net, before) == []
            loss_of(net, seed).backward()
            optimizer.second_step(zero_grad=True)
        optimizer.zero_grad()
        assert moved(net, before) == list(BINARY_LAYERS)
        assert steps(net) == [seed + 1] * 2


def test_sam_with_a_closure_takes_the_points_gradient_where_the_weights_gradient_is_taken() -> None:
    """At the perturbed latents, which base.step() no longer sees."""
    net = applied(SmoothConv, dtype=F64, radius=0.2).eval()
    train(net, SGD(net.parameters(), lr=0.1), 2)
    net.eval()
    loss_of(net, 5).backward()
    perturbed = twin(net)
    Sam(perturbed.parameters(), SGD, lr=0.1, rho=0.5).first_step(zero_grad=True)
    expected, _ = oracle(perturbed, 5, 0.1, 0.2, "filter", "simultaneous")
    optimizer = Sam(net.parameters(), SGD, lr=0.1, rho=0.5)
    optimizer.step(closure_of(net, optimizer, 5))
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(net)[name], expected[name], rtol=1e-9, atol=1e-12)


class Wrapper(Optimizer):
    """An optimizer around another, as Lookahead and the like: groups of its own, with options of its own."""

    def __init__(self, base: Optimizer, **defaults: Any) -> None:
        super().__init__([p for g in base.param_groups for p in g["params"]], defaults)
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize(
    "defaults", [{"lr": 0.1}, {"lr": 7.0, "alpha": 0.5}, {"alpha": 0.5}], ids=["same rate", "other rate", "none"]
)
def test_in_nested_optimizers_the_innermost_moves_each_point_once(
    defaults: dict[str, float], with_closure: bool
) -> None:
    reference, net = applied(), applied()
    train(reference, SGD(reference.parameters(), lr=0.1), 2)
    optimizer = Wrapper(Wrapper(SGD(net.parameters(), lr=0.1), **defaults), **defaults)
    if with_closure:
        for seed in range(2):
            optimizer.step(closure_of(net, optimizer, seed))
    else:
        train(net, optimizer, 2)
    assert steps(net) == [2, 2]
    assert same_state(state(net), state(reference))


class OwnSgd(SGD):
    """A user's subclass: torch fires the step hooks for it and again for its super().step()."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_its_parents_step_moves_each_point_once(with_closure: bool, order: str) -> None:
    reference, net = applied(order=order), applied(order=order)
    train(reference, SGD(reference.parameters(), lr=0.1), 2)
    optimizer = OwnSgd(net.parameters(), lr=0.1)
    for seed in range(2):
        closure = closure_of(net, optimizer, seed)
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert steps(net) == [2, 2]
    assert same_state(state(net), state(reference))


class RaisingSgd(SGD):
    raising = False

    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
        if self.raising:
            raise RuntimeError("out of memory, say")
        return super().step()


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_raises_moves_nothing_and_the_next_one_works(with_closure: bool, order: str) -> None:
    net = applied(order=order)
    optimizer = RaisingSgd(net.parameters(), lr=0.1)
    optimizer.raising = True
    closure = closure_of(net, optimizer, 0)
    closure()
    before = points(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure if with_closure else None)
    assert moved(net, before) == []
    optimizer.raising = False
    optimizer.step(closure if with_closure else None)
    assert moved(net, before) == list(BINARY_LAYERS)
    reference = applied(order=order)
    train(reference, SGD(reference.parameters(), lr=0.1), 1)
    assert equal(points(net), points(reference))


def test_after_a_step_that_raises_another_optimizer_can_take_the_same_gradients() -> None:
    net = applied()
    optimizer = RaisingSgd(net.parameters(), lr=0.1)
    optimizer.raising = True
    loss_of(net, 0).backward()
    before = points(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    SGD(net.parameters(), lr=0.1).step()
    assert moved(net, before) == list(BINARY_LAYERS)


# -- rates --------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lrs.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.2, total_steps=6),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.2, total_iters=2), lrs.PolynomialLR(o, 4)], milestones=[2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_points_rate_follows_the_schedule(name: str) -> None:
    net = applied()
    optimizer = SGD([{"params": net.parameters(), "lr": 0.1}], lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        rate = optimizer.param_groups[0]["lr"]
        rates.append(rate)
        reference = twin(net)
        SGD(reference.parameters(), lr=rate).step()
        optimizer.step()
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        assert equal(points(net), points(reference))
    assert len({round(rate, 6) for rate in rates}) > 1


def test_each_points_rate_is_that_of_its_weights_group_times_point_lr() -> None:
    net = applied(point_lr=0.5)
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


def test_a_tensor_as_learning_rate() -> None:
    one, other = applied(), applied()
    train(one, Adam(one.parameters(), lr=0.01), 2)
    train(other, Adam(other.parameters(), lr=torch.tensor(0.01), foreach=False), 2)
    for name in BINARY_LAYERS:
        torch.testing.assert_close(points(one)[name], points(other)[name])
        assert points(other)[name].any()


# -- several models, threads, copies --------


def test_two_models_trained_in_turn_do_not_meet() -> None:
    alone = [applied(seed=s) for s in range(2)]
    together = [applied(seed=s) for s in range(2)]
    for net, lr in zip(alone, (0.1, 0.3)):
        train(net, SGD(net.parameters(), lr=lr), 3)
    optimizers = [SGD(net.parameters(), lr=lr) for net, lr in zip(together, (0.1, 0.3))]
    for seed in range(3):
        for net, optimizer in zip(together, optimizers):
            before = [points(other) for other in together if other is not net]
            train(net, optimizer, 1, first=seed)
            assert all(moved(o, b) == [] for o, b in zip((o for o in together if o is not net), before))
    assert all(same_state(state(a), state(b)) for a, b in zip(alone, together))


def test_threads() -> None:
    references = [applied(seed=s) for s in range(4)]
    for net in references:
        train(net, SGD(net.parameters(), lr=0.1), 5)
    nets = [applied(seed=s) for s in range(4)]
    failures: list[BaseException] = []

    def work(net: TinyNet) -> None:
        try:
            train(net, SGD(net.parameters(), lr=0.1), 5)
        except BaseException as failure:  # a thread's exception would be lost
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(same_state(state(a), state(b)) for a, b in zip(references, nets))


def test_a_deepcopy_trains_by_itself() -> None:
    net = applied()
    train(net, SGD(net.parameters(), lr=0.1), 1)
    other = copy.deepcopy(net)
    assert same_state(state(net), state(other))
    before = state(net)
    train(other, SGD(other.parameters(), lr=0.1), 2, first=1)
    assert same_state(state(net), before)
    assert moved(other, points(net)) == list(BINARY_LAYERS)
    train(net, SGD(net.parameters(), lr=0.1), 2, first=1)
    assert same_state(state(net), state(other))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(use_buffers: bool) -> None:
    """The latents are averaged; the points are the model's (or averaged too, where buffers are), its flips its own."""
    net = applied()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = SGD(net.parameters(), lr=0.1)
    average.update_parameters(net)
    for seed in range(3):
        train(net, optimizer, 1, first=seed)
        old = latents(average)
        average.update_parameters(net)
        for name in BINARY_LAYERS:
            expected = 0.9 * old[f"module.{name}"] + 0.1 * latents(net)[name]
            torch.testing.assert_close(latents(average)[f"module.{name}"], expected)
    assert equal({f"module.{n}": p for n, p in points(net).items()}, points(average)) is not use_buffers
    for name, epc in clusters(net).items():
        assert torch.equal(clusters(average)[f"module.{name}"].flip_reference, epc.flip_reference)
    average.eval()
    assert average(batch()[0]).isfinite().all()


# -- optimizers that do not fire hooks --------


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


def test_no_such_report_for_an_averaged_teacher_in_training_mode() -> None:
    student = applied()
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5)).train()
    optimizer = SGD(student.parameters(), lr=0.1)
    for seed in range(8):
        train(student, optimizer, 1, first=seed)
        teacher.update_parameters(student)
        with torch.no_grad():
            teacher(batch(seed)[0])


# -- optimizers that step the points themselves --------

CLUSTER_OPTIMIZERS = {
    "sgd": (hbnn_plugin.ClusterSGD, SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adam": (hbnn_plugin.ClusterAdam, Adam, {"lr": 0.01}),
    "adamw": (hbnn_plugin.ClusterAdamW, AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
each_cluster_optimizer = pytest.mark.parametrize("name", CLUSTER_OPTIMIZERS)


@each_cluster_optimizer
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("rule", ["mobius", "riemannian", "riemannian-adam"])
def test_cluster_optimizers_are_automatic_stepping_to_the_bit(name: str, rule: str, order: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    one, other, third = (applied(rule=rule, order=order) for _ in range(3))
    train(one, plain(one.parameters(), **options), 3)
    train(other, own(other.parameters(), **options), 3)
    optimizer = own(third.parameters(), **options)
    for seed in range(3):
        optimizer.step(closure_of(third, optimizer, seed))
    assert same_state(state(one), state(other))
    assert same_state(state(one), state(third))
    assert steps(third) == [3, 3]


@each_cluster_optimizer
def test_cluster_optimizers_resume_from_their_state_dict(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    one = applied()
    optimizer = own(one.parameters(), point_lr=2.0, **options)
    train(one, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = applied(seed=1)
    again = own(other.parameters(), **options)
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    for net, o in ((one, optimizer), (other, again)):
        train(net, o, 2, first=2)
    assert same_state(state(one), state(other))


@each_cluster_optimizer
def test_cluster_optimizers_copy_and_pickle(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    optimizer = own(net.parameters(), point_lr=2.0, **options)
    train(net, optimizer, 1)
    net_copy, optimizer_copy = copy.deepcopy((net, optimizer))
    before = state(net)
    train(net_copy, optimizer_copy, 2, first=1)
    assert same_state(state(net), before)
    train(net, optimizer, 2, first=1)
    assert same_state(state(net), state(net_copy))
    unpickled = pickle.loads(pickle.dumps(optimizer))
    assert type(unpickled) is own
    assert unpickled.param_groups[0]["point_lr"] == 2.0
    assert unpickled.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    unpickled.step()


@each_cluster_optimizer
def test_cluster_optimizers_take_schedules_point_lr_and_grad_scaler(name: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    one, other = applied(point_lr=3.0), applied()
    pairs = [(one, plain(one.parameters(), **options)), (other, own(other.parameters(), point_lr=3.0, **options))]
    for net, optimizer in pairs:
        scheduler = lrs.ExponentialLR(optimizer, 0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for seed in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, seed)).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    without_settings = [{k: v for k, v in state(n).items() if "_extra_state" not in k} for n in (one, other)]
    assert same_state(*without_settings)
    assert all(p.any() for p in points(other).values())


@each_cluster_optimizer
def test_hooks_on_a_cluster_optimizer_run_once_a_step(name: str) -> None:
    own, plain, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    plain(net.parameters(), **options)  # torch puts hooks on a class's step when it is first constructed
    optimizer = own(net.parameters(), **options)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(net, optimizer, 2)
    assert calls == ["before", "after"] * 2


@each_cluster_optimizer
def test_point_lr_of_a_cluster_optimizer_holds_for_groups_added_later(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    net = applied()
    optimizer = own(net.conv1.parameters(), point_lr=0.0, **options)
    optimizer.add_param_group({"params": list(net.conv2.parameters())})
    before = points(net)
    train(net, optimizer, 2)
    assert moved(net, before) == []


@each_cluster_optimizer
def test_a_cluster_optimizer_needs_an_applied_model(name: str) -> None:
    own, _, options = CLUSTER_OPTIMIZERS[name]
    with pytest.raises(ValueError, match=r"Cluster.* got no latent weight.*apply\(model\) first"):
        own(tiny_net().parameters(), **options)
    with pytest.raises(ValueError, match="got no latent weight"):
        own(applied().fc.parameters(), **options)
