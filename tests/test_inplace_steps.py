"""An optimizer's step in in-place mode, also one that raises, nests or evaluates closures.

On a smooth host in float64 parametrize mode is the oracle: both modes take the very same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

import hbnn_plugin
from hbnn_plugin.cluster import swapping
from inplace_nets import CURVED, agree, mapped, smooth
from tiny_hosts import BINARY_LAYERS, SmoothConv, TinyNet, clusters, latents, loss_of, points, tiny_net, train
from training_helpers import F64, closure_of

# -- a step that raises ------------------------------------------------------------------------------------------------


class Failure(Exception):
    """What the optimizers here raise."""


class FailingSgd(SGD):
    """Gradient descent that may fail before, amid or after the update."""

    fails: str | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.fails == "before":
            raise Failure
        held = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for i, (p, lr) in enumerate(held):
            if self.fails == "amid" and i == 4:  # conv1 has been updated, conv2 has not
                raise Failure
            p.add_(p.grad, alpha=-lr)
        if self.fails == "after":
            raise Failure


def with_optimizer(mode: str, scheduled: bool, cls: type[SGD] = FailingSgd) -> tuple[TinyNet, SGD, LRScheduler | None]:
    """Optimizer, and perhaps schedule, are there before apply."""
    net = tiny_net(SmoothConv, dtype=F64)
    optimizer = cls(net.parameters(), lr=0.3)
    scheduler = StepLR(optimizer, 1, gamma=0.7) if scheduled else None
    with pytest.warns(UserWarning, match="two-valued"):
        hbnn_plugin.apply(net, mode=mode, **CURVED)
    return net, optimizer, scheduler


def step_of(net: TinyNet, optimizer: Optimizer, scheduler: LRScheduler | None, seed: int) -> None:
    train(net, optimizer, 1, first=seed)
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("fails", ["before", "amid", "after"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_a_step_that_raises_leaves_the_mapped_weight_and_its_gradient(fails: str, scheduled: bool, first: bool) -> None:
    nets = {}
    for mode in ("inplace", "parametrize"):
        net, optimizer, scheduler = with_optimizer(mode, scheduled)
        if not first:
            step_of(net, optimizer, scheduler, 8)
        weights = [net.get_submodule(name).weight for name in BINARY_LAYERS]
        optimizer.zero_grad()
        loss_of(net, 9).backward()
        gradients = [epc.parameter.grad for epc in clusters(net).values()]
        kept, before, v = [g.clone() for g in gradients], points(net), latents(net)
        values = [w.detach().clone() for w in weights]
        optimizer.fails = fails
        with pytest.raises(Failure):
            optimizer.step()
        optimizer.fails = None
        if mode == "inplace":
            assert mapped(net)
            assert all(w is net.get_submodule(name).weight for w, name in zip(weights, BINARY_LAYERS))
            assert all(w.grad is g and torch.equal(g, k) for w, g, k in zip(weights, gradients, kept))
            changed = [not torch.equal(w, value) for w, value in zip(weights, values)]
            assert changed == {"before": [False, False], "amid": [True, False], "after": [True, True]}[fails]
        assert all(torch.equal(p, before[name]) for name, p in points(net).items())
        stayed = [torch.equal(now, v[name]) for name, now in latents(net).items()]
        assert stayed == [fails == "before", fails != "after"]
        for seed in range(3):
            step_of(net, optimizer, scheduler, seed)
        assert all(not torch.equal(p, before[name]) for name, p in points(net).items())
        nets[mode] = net
    assert mapped(nets["inplace"])
    assert agree(nets["inplace"], nets["parametrize"])


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_that_raises_leaves_the_mapped_weight(kind: str) -> None:
    net = smooth()
    optimizer = SGD(net.parameters(), lr=0.3)

    def fail(*_: Any) -> None:
        raise Failure

    hook = getattr(optimizer, f"register_step_{kind}_hook")(fail)
    loss_of(net).backward()
    weights = [net.get_submodule(name).weight for name in BINARY_LAYERS]
    gradients = [w.grad for w in weights]
    with pytest.raises(Failure):
        optimizer.step()
    hook.remove()
    assert mapped(net)
    assert all(w.grad is g for w, g in zip(weights, gradients))
    before = points(net)
    train(net, optimizer, 2)
    assert mapped(net) and all(not torch.equal(p, before[name]) for name, p in points(net).items())


class Interrupted:
    """A function that is cut off once, at a call, before it does anything or when it has; or each time from then on."""

    def __init__(self, function: Callable[..., Any], call: int, done: bool, times: float = 1) -> None:
        self.function, self.call, self.done, self.times = function, call, done, times

    def __call__(self, *args: Any) -> Any:
        self.call -= 1
        cut_off = self.call < 0 and self.times > 0
        self.times -= cut_off
        if cut_off and not self.done:
            raise KeyboardInterrupt
        result = self.function(*args)
        if cut_off:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "call", "stepped"),
    [("pull_back", 0, False), *(("sharded_like", n, False) for n in range(4)), ("exp_maps", 0, True)],
)
def test_an_interrupt_between_latent_and_weight_leaves_nothing_half_way(
    name: str, call: int, stepped: bool, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the latents come in (two gradients, two weights) the step is not made; as they leave, it has been."""
    net, undisturbed = smooth(), smooth()
    optimizers = [SGD(n.parameters(), lr=0.3) for n in (net, undisturbed)]
    for n, optimizer in zip((net, undisturbed), optimizers):
        train(n, optimizer, 2)
        optimizer.zero_grad()
        loss_of(n, 2).backward()
    gradients = [epc.parameter.grad for epc in clusters(net).values()]
    with monkeypatch.context() as patch:
        patch.setattr(swapping, name, Interrupted(getattr(swapping, name), call, done))
        with pytest.raises(KeyboardInterrupt):
            optimizers[0].step()
    assert mapped(net)
    assert all(epc.parameter.grad is g for epc, g in zip(clusters(net).values(), gradients))
    if not stepped:
        optimizers[0].step()
    optimizers[1].step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(latents(net).values(), latents(undisturbed).values()))


def test_where_memory_has_run_out_for_good_the_next_step_writes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = smooth()
    optimizer = SGD(net.parameters(), lr=0.3)
    train(net, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(swapping, "exp_maps", Interrupted(swapping.exp_maps, 0, False, float("inf")))
        with pytest.raises(KeyboardInterrupt):
            train(net, optimizer, 1)
    before = latents(net)
    optimizer.zero_grad()
    optimizer.step()
    assert mapped(net)
    assert all(torch.equal(v, before[name]) for name, v in latents(net).items())
    train(net, optimizer, 1)
    assert mapped(net) and all(not torch.equal(v, before[name]) for name, v in latents(net).items())


@pytest.mark.parametrize("mode", ["inplace", "parametrize"])
@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_a_backward_that_waits_may_go_through_a_layer_without_a_gradient(mode: str) -> None:
    net = hbnn_plugin.apply(nn.ModuleList(SmoothConv(3, 4, 3) for _ in range(2)), mode=mode)
    optimizer = SGD(net.parameters(), lr=0.1)
    x = torch.randn(2, 3, 5, 5)
    now, later = (layer(x).square().sum() for layer in net)
    now.backward()
    optimizer.step()
    later.backward()
    assert [float(epc.revision) for epc in clusters(net).values()] == [1, 0]


def test_a_weight_of_another_shape_is_named() -> None:
    net = smooth()
    net.conv1.weight = nn.Parameter(torch.zeros(1, *net.conv1.weight.shape[1:], dtype=F64))
    net.conv1.weight.grad = torch.zeros_like(net.conv1.weight)
    with pytest.raises(RuntimeError, match=r"^conv1: its weight has been replaced by one of the shape \(1, "):
        SGD(net.parameters(), lr=0.1).step()


# -- optimizers that do something around their parent's step, and closures ---------------------------------------------


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class ChangesGradients(SGD):
    """Edits gradients in place, such as gradient centralization."""

    def step(self, closure: Any = None) -> Any:
        for p in _parameters(self):
            p.grad.mul_(0.5)
        return super().step(closure)


class ReplacesGradients(SGD):
    def step(self, closure: Any = None) -> Any:
        for p in _parameters(self):
            p.grad = p.grad.clamp(-0.01, 0.01)
        return super().step(closure)


class Interpolates(SGD):
    """Goes half of the way, such as Lookahead."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [p.clone() for p in _parameters(self)]
        super().step(closure)
        for p, old in zip(_parameters(self), before):
            p.lerp_(old, 0.5)


class DecaysAfterwards(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in _parameters(self):
            p.mul_(0.9)


class NeverCompiled(Optimizer):
    """Kept from torch.compile by its author, as torch itself does with some optimizers."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in _parameters(self):
            p.sub_(self.param_groups[0]["lr"] * p.grad)


@pytest.mark.parametrize("rule", ["mobius", "fixed"])
@pytest.mark.parametrize("cls", [ChangesGradients, ReplacesGradients, Interpolates, DecaysAfterwards, NeverCompiled])
def test_what_a_subclass_does_around_its_parents_step_happens_to_the_latent(cls: Any, rule: str) -> None:
    SGD([torch.zeros(1, requires_grad=True)])  # from now on SGD.step itself fires hooks, inside the subclass's too
    nets = [smooth(mode, rule=rule) for mode in ("inplace", "parametrize")]
    for net in nets:
        train(net, cls(net.parameters(), lr=0.3), 3)
    assert mapped(nets[0])
    assert agree(*nets)


class Sam(Optimizer):
    """Climbs after a first evaluation, steps from where it was by the gradients of a second."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        evaluate = torch.enable_grad()(closure)
        evaluate()
        before = [p.clone() for p in _parameters(self)]
        for p in _parameters(self):
            p.add_(p.grad, alpha=0.5)
        evaluate()
        for p, old in zip(_parameters(self), before):
            p.copy_(old - self.param_groups[0]["lr"] * p.grad)


class RemembersFirst(Sam):
    """Looks at the parameters before it has evaluated anything."""

    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        before = [p.clone() for p in _parameters(self)]
        torch.enable_grad()(closure)()
        for p, old in zip(_parameters(self), before):
            p.copy_(old - self.param_groups[0]["lr"] * p.grad)


CLOSURES: dict[str, Callable[[Any], Optimizer]] = {
    "lbfgs": lambda params: LBFGS(params, lr=0.1, max_iter=4),
    "lbfgs with a line search": lambda params: LBFGS(params, max_iter=4, line_search_fn="strong_wolfe"),
    "sam": lambda params: Sam(params, 0.3),
    "remembers first": lambda params: RemembersFirst(params, 0.3),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_closure_sees_the_mapped_weight_in_every_evaluation(name: str) -> None:
    nets = [smooth(mode) for mode in ("inplace", "parametrize")]
    for net in nets:
        optimizer = CLOSURES[name](net.parameters())
        seen: list[Tensor] = []
        for seed in range(2):
            evaluate = closure_of(net, optimizer, seed)

            def closure(net: TinyNet = net, evaluate: Any = evaluate, seen: list[Tensor] = seen) -> Tensor:
                assert net is nets[1] or mapped(net)
                seen.append(net.conv1.weight.detach().clone())
                return evaluate()

            optimizer.zero_grad()
            optimizer.step(closure)
        assert len(seen) >= (2 if name == "remembers first" else 4)
        assert not torch.equal(seen[0], seen[-1])
    assert mapped(nets[0])
    assert agree(*nets, rtol=1e-6)
