"""Whatever stands around an optimizer's step, points move by the gradients that its innermost part sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from hbnn_plugin.hooking import _CELL, _WRAPPER
from tiny_hosts import loss_of, same_state, state
from training_helpers import applied, steps

LIMIT = 0.01

each_mode = pytest.mark.parametrize("mode", ["parametrize", "inplace"])


def clip(optimizer: Optimizer) -> None:
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], LIMIT)


def in_a_hook(parameters: Any) -> Optimizer:
    optimizer = SGD(parameters, lr=0.5)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: clip(optimizer))
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
@pytest.mark.parametrize("clipping", [in_a_hook, in_a_subclass])
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
    class Own(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

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
    before = state(net)
    with pytest.raises(RuntimeError, match=r"conv1 is in in-place mode.*Own\.step.*functools\.wraps.*ClusterSGD"):
        optimizer.step()
    assert same_state(state(net), before)


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
