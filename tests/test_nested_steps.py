"""Each point moves once in a step that takes closures, contains other steps or raises."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from hbnn_plugin.optimizer.open_steps import in_progress
from inplace_nets import agree, mapped, smooth
from tiny_hosts import BINARY_LAYERS, SmoothConv, loss_of, points, same_state, state, train, twin
from training_helpers import F64, OPTIMIZERS, applied, closure_of, each_mode, equal, moved, oracle, steps


@each_mode
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures(name: str, as_keyword: bool, order: str, mode: str) -> None:
    reference, net = (applied(order=order, mode=mode) for _ in range(2))
    train(reference, OPTIMIZERS[name](reference.parameters()), 3)
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(3):
        closure = closure_of(net, optimizer, seed)
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.ndim == 0
    assert same_state(state(net), state(reference))


@each_mode
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_moves_each_point_once_a_step(line_search: str | None, mode: str) -> None:
    net = applied(SmoothConv, dtype=F64, mode=mode)
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


@each_mode
def test_alternating_refuses_optimizers_that_evaluate_their_closure_again(mode: str) -> None:
    net = applied(order="alternating", mode=mode)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=4)
    with pytest.raises(RuntimeError, match=r"alternating.*LBFGS.*simultaneous"):
        optimizer.step(closure_of(net, optimizer, 0))
    assert mode == "parametrize" or mapped(net)


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


@each_mode
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [True, False])
def test_sam_moves_each_point_once(with_closure: bool, order: str, mode: str) -> None:
    net = applied(order=order, mode=mode)
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
    net = applied(SmoothConv, dtype=F64, rule="mobius", radius=0.2).eval()
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


def test_sam_in_two_calls_perturbs_what_parameters_hold() -> None:
    """In place that is the weight, not the latent: the step is the plain one with the gradient from over there."""
    net, reference = smooth("inplace"), smooth("inplace")
    optimizer = Sam(net.parameters(), SGD, lr=0.1, rho=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(net, seed).backward()
        optimizer.second_step(zero_grad=True)

        reference.zero_grad()
        loss_of(reference, seed).backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm() + 1e-12
        perturbed = twin(reference)
        with torch.no_grad():
            for p in perturbed.parameters():
                p.add_(p.grad * 0.5 / norm)
        perturbed.zero_grad()
        loss_of(perturbed, seed).backward()
        for mine, theirs in zip(reference.parameters(), perturbed.parameters()):
            mine.grad = theirs.grad
        SGD(reference.parameters(), lr=0.1).step()
    assert agree(net, reference) and mapped(net)
    assert steps(net) == [3, 3]


class Wrapper(Optimizer):
    """An optimizer around another, as Lookahead and the like: groups of its own, with options of its own."""

    def __init__(self, base: Optimizer, **defaults: Any) -> None:
        super().__init__([p for g in base.param_groups for p in g["params"]], defaults)
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@each_mode
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize(
    "defaults", [{"lr": 0.1}, {"lr": 7.0, "alpha": 0.5}, {"alpha": 0.5}], ids=["same rate", "other rate", "none"]
)
def test_in_nested_optimizers_the_innermost_moves_each_point_once(
    defaults: dict[str, float], with_closure: bool, mode: str
) -> None:
    reference, net = applied(mode=mode), applied(mode=mode)
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


@each_mode
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_its_parents_step_moves_each_point_once(
    with_closure: bool, order: str, mode: str
) -> None:
    reference, net = applied(order=order, mode=mode), applied(order=order, mode=mode)
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


@each_mode
@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_raises_moves_nothing_and_the_next_one_works(with_closure: bool, order: str, mode: str) -> None:
    net = applied(order=order, mode=mode)
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
    reference = applied(order=order, mode=mode)
    train(reference, SGD(reference.parameters(), lr=0.1), 1)
    assert equal(points(net), points(reference))


@each_mode
def test_after_a_step_that_raises_another_optimizer_can_take_the_same_gradients(mode: str) -> None:
    net = applied(mode=mode)
    optimizer = RaisingSgd(net.parameters(), lr=0.1)
    optimizer.raising = True
    loss_of(net, 0).backward()
    before = points(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    SGD(net.parameters(), lr=0.1).step()
    assert moved(net, before) == list(BINARY_LAYERS)


@each_mode
def test_after_a_step_that_raises_a_dropped_optimizer_lets_its_model_go(mode: str) -> None:
    net = applied(mode=mode)
    optimizer = RaisingSgd(net.parameters(), lr=0.1)
    optimizer.raising = True
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    model = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert model() is None and not in_progress()
