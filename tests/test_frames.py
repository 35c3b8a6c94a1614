"""Whatever stands around an optimizer's step, points move by the gradients that its innermost part sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer

from hbnn_plugin.optimizer.hooking import _CELL, _WRAPPER
from tiny_hosts import SmoothConv, clusters, loss_of, same_state, state
from training_helpers import F64, applied, closure_of, each_mode, steps

LIMIT = 0.01


def clip(optimizer: Optimizer) -> None:
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], LIMIT)


def in_a_hook(parameters: Any) -> Optimizer:
    optimizer = SGD(parameters, lr=0.5)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: clip(optimizer))
    return optimizer


def behind_autograds_back(parameters: Any) -> Optimizer:
    """A hook that leaves no trace: ``.data`` edits bump no version."""
    optimizer = SGD(parameters, lr=0.5)

    def clip_data(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held]
        for p, gradient in zip(held, gradients):
            p.grad = gradient.clone()
        clip(optimizer)
        for p, gradient in zip(held, gradients):
            gradient.data.copy_(p.grad)
            p.grad = gradient

    optimizer.register_step_pre_hook(clip_data)
    return optimizer


def in_a_subclass(parameters: Any) -> Optimizer:
    class Base(SGD):  # torch hooks the step of a class as one is built, so not this one's
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Clipping(Base):
        def step(self, closure: Any = None) -> Any:
            clip(self)
            return super().step(closure)

    return Clipping(parameters, lr=0.5)


@pytest.mark.parametrize("rule", ["mobius", "spectral"])
@pytest.mark.parametrize("clipping", [in_a_hook, behind_autograds_back, in_a_subclass])
def test_points_see_gradients_as_clipped_within_the_step(clipping: Callable[[Any], Optimizer], rule: str) -> None:
    net, reference = applied(rule=rule), applied(rule=rule)
    optimizer, plain = clipping(net.parameters()), SGD(reference.parameters(), lr=0.5)
    for seed in range(3):
        for model, stepped in ((net, optimizer), (reference, plain)):
            stepped.zero_grad()
            loss_of(model, seed).backward()
        clip(plain)
        plain.step()
        optimizer.step()
    assert same_state(state(net), state(reference))


def half(parameters: Any) -> None:
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(0.5)


class Halving(SGD):
    """Halves gradients within its step, in the closure if there is one."""

    def step(self, closure: Any = None) -> Any:
        parameters = self.param_groups[0]["params"]
        if closure is None:
            half(parameters)
            return super().step()

        def halved() -> Any:
            loss = closure()
            half(parameters)
            return loss

        return super().step(halved)


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_scales_gradients_scales_those_of_the_points(with_closure: bool, order: str) -> None:
    """In float64, so that a half of the gradients and a half of the loss are the same."""
    net, reference = (applied(SmoothConv, dtype=F64, rule="mobius", order=order) for _ in range(2))
    optimizer, plain = Halving(net.parameters(), lr=0.5), SGD(reference.parameters(), lr=0.5)
    for seed in range(3):
        closure = closure_of(net, optimizer, seed)
        if not with_closure:
            closure()
        optimizer.step(closure if with_closure else None)
        plain.zero_grad()
        (0.5 * loss_of(reference, seed)).backward()
        plain.step()
    for name, value in state(net).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, state(reference)[name], rtol=1e-9, atol=1e-12)
    assert steps(net) == [3, 3]


@each_mode
def test_a_point_whose_latents_gradient_is_taken_away_within_the_step_stands_still(mode: str) -> None:
    net = applied(mode=mode)

    class Dropping(SGD):
        def step(self, closure: Any = None) -> Any:
            clusters(net)["conv1"].parameter.grad = None
            return super().step(closure)

    loss_of(net).backward()
    Dropping(net.parameters(), lr=0.1).step()
    assert steps(net) == [0, 1]


@each_mode
def test_a_step_that_takes_a_loss_or_something_by_name_moves_its_points(mode: str) -> None:
    class OfLoss(SGD):
        def step(self, loss: Any = None, *, optimizer: str = "") -> Any:  # type: ignore[override]
            return super().step()

    net, reference = applied(mode=mode), applied(mode=mode)
    optimizer, plain = OfLoss(net.parameters(), lr=0.1), SGD(reference.parameters(), lr=0.1)
    for model in (net, reference):
        loss_of(model).backward()
    optimizer.step(torch.tensor(1.0), optimizer="own")
    plain.step()
    assert same_state(state(net), state(reference))


@each_mode
def test_an_optimizer_that_changes_its_class(mode: str) -> None:
    class Later(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    net, reference = applied(mode=mode), applied(mode=mode)
    optimizer, plain = (SGD(model.parameters(), lr=0.1) for model in (net, reference))
    optimizer.__class__ = Later
    for model, stepped in ((net, optimizer), (reference, plain)):
        loss_of(model).backward()
        stepped.step()
    assert same_state(state(net), state(reference))


def test_other_optimizers_of_the_class_still_compile() -> None:
    net = applied()
    loss_of(net).backward()
    Adam(net.parameters()).step()
    linear, operators = torch.nn.Linear(2, 2), []
    other = Adam(linear.parameters(), capturable=False, foreach=True)
    linear(torch.ones(1, 2)).sum().backward()

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step() -> None:
        other.step()

    torch.compiler.reset()
    torch.compile(step, backend=counting)()
    assert len(operators) > 10


@pytest.mark.parametrize("clipping", [in_a_hook, in_a_subclass])
def test_in_place_the_step_clips_what_the_optimizer_steps(clipping: Callable[[Any], Optimizer]) -> None:
    """A pre-hook sees the mapped weights' gradients, a step those of the latents."""
    net = applied(rule="mobius", mode="inplace")
    optimizer = clipping(net.parameters())
    loss_of(net).backward()
    before = state(net)
    optimizer.step()
    apart = sum((value - before[name]).square().sum() for name, value in state(net).items() if "point" in name)
    assert 0 < apart.sqrt() < 2 * 0.5 * LIMIT
    assert steps(net) == [1, 1]


def decorated(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def timed(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return timed


def hidden(step: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return timed


def replaced(parameters: Any, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Optimizer:
    class Own(Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-group["lr"])
            return loss

    optimizer = Own(parameters, lr=0.1)
    Own.step = by(Own.step)  # type: ignore[method-assign]
    return optimizer


@each_mode
def test_a_step_decorated_after_the_optimizer_was_built_is_framed(mode: str) -> None:
    net, reference = applied(mode=mode), applied(mode=mode)
    for model, optimizer in (
        (net, replaced(net.parameters(), decorated)),
        (reference, SGD(reference.parameters(), 0.1)),
    ):
        loss_of(model).backward()
        optimizer.step()
    assert same_state(state(net), state(reference))
    assert steps(net) == [1, 1]


def test_a_step_that_hides_torchs_own_moves_the_points_and_is_refused_in_place() -> None:
    net = applied()
    optimizer = replaced(net.parameters(), hidden)
    loss_of(net).backward()
    optimizer.step()
    assert steps(net) == [1, 1]
    net = applied(mode="inplace")
    optimizer = replaced(net.parameters(), hidden)
    loss_of(net).backward()
    with pytest.raises(RuntimeError, match=r"conv1 is in in-place mode.*Own\.step.*functools\.wraps.*ClusterSGD"):
        optimizer.step()


def test_the_frame_finds_torchs_wrapper_whatever_it_calls_the_step() -> None:

    def step() -> None: ...

    wrapper = Optimizer.profile_hook_step(step)
    assert wrapper.__code__ is _WRAPPER
    assert wrapper.__closure__ is not None and wrapper.__closure__[_CELL].cell_contents is step


def test_a_base_without_instances_steps_as_before_once_one_is_built() -> None:
    class Base(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Derived(Base):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for cls in (Derived, Base):
        net, reference = applied(), applied()
        for model, optimizer in ((net, cls(net.parameters(), lr=0.1)), (reference, SGD(reference.parameters(), 0.1))):
            loss_of(model).backward()
            optimizer.step()
        assert same_state(state(net), state(reference))
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    Base([p], lr=0.5).step()
    assert p.item() == 0.5


@each_mode
@pytest.mark.parametrize("value", [float("nan"), -1.0, None, "fast"])
def test_a_groups_point_lr_that_is_none_is_refused_before_anything_moves(value: Any, mode: str) -> None:
    net = applied(mode=mode)
    optimizer = SGD([{"params": list(net.parameters()), "point_lr": value}], lr=0.1)
    loss_of(net).backward()
    before = state(net)
    with pytest.raises(ValueError, match=rf"conv1: .* has point_lr={value!r}; it must be a finite number from 0"):
        optimizer.step()
    assert same_state(state(net), before)
