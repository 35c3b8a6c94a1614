"""Points step whenever an optimizer that holds their latents steps.

torch calls global hooks before and after every ``Optimizer.step``. Before it, the points' gradients are recovered from
the latents' (:mod:`hbnn_plugin.recovery`); after it, once the optimizer has succeeded, the points move
(:mod:`hbnn_plugin.rules`). Order ``"alternating"`` also rewrites ``latent.grad`` in between, to what it would be at the
points' new places (Algorithm 1 of [HBNN], with the upstream gradient at hand).

* A closure is wrapped: its first evaluation gives the gradients.
* Of nested steps (SAM, ZeroRedundancyOptimizer, a subclass that calls ``super().step()``) the innermost moves the
  point, once, at its own learning rate.
* A step that raises, or that GradScaler skips, moves nothing.
* In in-place mode (:mod:`hbnn_plugin.inplace`) the outermost step is framed: latents enter the hosts' weights before
  it and leave them after, also when it raises. A closure sees the mapped weights.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .cluster import EPC, alive
from .epc import pull_back
from .inplace import InPlace, enter, leave
from .recovery import Recovered, recover
from .rules import Move, move, point_rate
from .sharding import sharded_like, whole

__all__ = ["PointStep", "held_clusters", "install", "step_points"]

_open = threading.local()


def held_clusters(optimizer: Optimizer) -> list[tuple[EPC, dict[str, Any]]]:
    """The clusters whose latents this optimizer holds, each with the latent's parameter group.

    In the optimizer's order, which is the same on all ranks of a distributed training.
    """
    clusters = alive()
    if not clusters:
        return []
    held = [(id(parameter), group) for group in optimizer.param_groups for parameter in group["params"]]
    places = {key: (place, group) for place, (key, group) in enumerate(held)}
    found = [(*places[id(epc.parameter)], epc) for epc in clusters if id(epc.parameter) in places]
    return [(epc, group) for _, group, epc in sorted(found, key=lambda entry: entry[0])]


@dataclass
class _Pending:
    """A point's move, gathered and not yet made."""

    epc: EPC
    found: Recovered
    group: dict[str, Any]
    gradient: Tensor
    """The latent's gradient that it came from, and its version then."""
    version: int
    moves_then: int
    landing: list[Tensor] | None = None
    """Under ``"alternating"`` the point's state after the move: ``gradient`` is rewritten to be right there."""

    def comes_from(self, gradient: Tensor) -> bool:
        return self.gradient is gradient and self.version == gradient._version

    def land(self) -> Move | None:
        """Let the point arrive where it is known to, unless somebody has moved it since; else the move to be made."""
        if self.epc.moves != self.moves_then:
            return None
        if self.landing is not None:
            self.epc.moves += 1
            _restore(self.epc, self.landing)
            return None
        if self.group.get("lr") is None:  # a wrapper may have none, if the optimizer inside has one
            raise RuntimeError(
                f"{self.epc.name}: its weight's parameter group has no learning rate 'lr', so its point's is unknown; "
                "put an 'lr' into the group, or apply with rule='fixed'"
            )
        lr = point_rate(self.epc, self.group)
        return Move(self.epc, self.found, -lr if self.group.get("maximize") else lr, self.group)


class PointStep:
    """The points' part of one optimizer step: :meth:`gather`, then the optimizer, then :meth:`finish`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        held = held_clusters(optimizer)
        self.clusters = [(epc, group) for epc, group in held if epc.settings.rule != "fixed"]
        self.swaps = [epc for epc, _ in held if isinstance(epc, InPlace) and not epc.swapped]
        self.frames = (
            0  # of this optimizer's step in progress, with in-place hosts: more than one inside super().step()
        )
        self.pending: dict[int, _Pending] = {}
        self._evaluations = 0

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the gradients gathered after its first evaluation."""

        def evaluate() -> Any:
            self.leave()
            loss = closure()
            self.enter()
            self._evaluations += 1
            if self._evaluations == 1:
                self.gather()
            elif any(epc.settings.order == "alternating" for epc, _ in self.clusters):
                raise RuntimeError(
                    f"order='alternating' moves the points before the weights, but {type(self.optimizer).__name__} "
                    "evaluates its closure more than once a step; use order='simultaneous'"
                )
            return loss

        evaluate.points_of = self.optimizer  # type: ignore[attr-defined]
        return evaluate

    def enter(self) -> None:
        """Let the latents into the weights of in-place hosts."""
        enter(self.swaps)

    def leave(self) -> None:
        """Let the mapped weights back in."""
        leave(self.swaps)

    def gather(self) -> None:
        """Recover the points' gradients, but for those that an enclosing step has from the very same gradients."""
        due = []
        for epc, group in self.clusters:
            gradient = epc.parameter.grad
            if gradient is not None and not self._take_over(epc, gradient, group):
                due.append((epc, gradient, group))
        if not due:
            return
        recovered = recover(
            [epc for epc, _, _ in due],
            [gradient for _, gradient, _ in due],
            grad_scale=getattr(self.optimizer, "grad_scale", None),
            found_inf=getattr(self.optimizer, "found_inf", None),
            upstream=any(epc.settings.order == "alternating" for epc, _, _ in due),
        )
        for (epc, gradient, group), found in zip(due, recovered):
            pending = _Pending(epc, found, group, gradient, gradient._version, epc.moves)
            if epc.settings.order == "alternating":
                before = _state(epc)
                _make([pending])
                _rewrite(gradient, epc, found)
                pending.landing, pending.version = _state(epc), gradient._version
                pending.moves_then = epc.moves
                _restore(epc, before)
            self.pending[id(epc)] = pending

    def _take_over(self, epc: EPC, gradient: Tensor, group: dict[str, Any]) -> bool:
        for step in reversed(_stack()):
            pending = step.pending.get(id(epc))
            if pending is not None and pending.comes_from(gradient):
                pending.group = group
                self.pending[id(epc)] = step.pending.pop(id(epc))
                return True
        return False

    def holds_all(self) -> bool:
        """Whether every gradient that is there now has been gathered here."""
        gradients = [(self.pending.get(id(epc)), epc.parameter.grad) for epc, _ in self.clusters]
        there = [(pending, gradient) for pending, gradient in gradients if gradient is not None]
        return bool(there) and all(p is not None and p.comes_from(g) for p, g in there)

    def finish(self) -> None:
        """Move the points."""
        pending, self.pending = self.pending, {}
        _make(pending.values())


def _make(moves: Iterable[_Pending]) -> None:
    move([due for pending in moves if (due := pending.land()) is not None])


def _state(epc: EPC) -> list[Tensor]:
    return [t.clone() for t in (epc.point, epc.momentum, epc.mean_square, epc.steps) if t is not None]


@torch.no_grad()
def _restore(epc: EPC, state: list[Tensor]) -> None:
    tensors = [t for t in (epc.point, epc.momentum, epc.mean_square, epc.steps) if t is not None]
    for tensor, value in zip(tensors, state):
        tensor.copy_(value)


@torch.no_grad()
def _rewrite(gradient: Tensor, epc: EPC, found: Recovered) -> None:
    """Put into ``gradient`` what it would be at the point where the cluster is now."""
    assert found.upstream is not None
    of = epc.map_of(epc.parameter.detach())
    rewritten = pull_back([of], [found.upstream])[0].reshape(gradient.shape)
    valid = found.valid.expand(epc.shape).reshape(gradient.shape)
    kept = torch.where(valid, rewritten.to(gradient.dtype), whole(gradient))
    gradient.copy_(sharded_like(kept, gradient))


def step_points(optimizer: Optimizer) -> None:
    """Move the points of the latents that ``optimizer`` holds, from the gradients these have now.

    For optimizers that do not fire torch's step hooks: call it right before ``optimizer.step()``.

    Raises:
        ValueError: a latent is in in-place mode, where the optimizer's step itself has to be framed.
    """
    step = PointStep(optimizer)
    if step.swaps:
        raise ValueError(
            f"{step.swaps[0].name} is in in-place mode, which needs an optimizer that fires torch's step hooks: let "
            f"{type(optimizer).__name__} call super().__init__(), or apply with mode='parametrize'"
        )
    step.gather()
    step.finish()


def _stack() -> list[PointStep]:
    """The steps in progress on this thread, outermost first."""
    if not hasattr(_open, "steps"):
        _open.steps = []
    steps: list[PointStep] = _open.steps
    return steps


def _open_step(optimizer: Optimizer) -> PointStep | None:
    return next((step for step in reversed(_stack()) if step.optimizer is optimizer), None)


def _begin(optimizer: Optimizer, closure: object) -> PointStep | None:
    """Open the points' part of a step of ``optimizer``; None if it holds no latent."""
    stack, step = _stack(), _open_step(optimizer)
    if step is not None:  # inside super().step(), or after a step that raised
        goes_on = step.frames > 0 or (closure is None and step.holds_all())
        del stack[stack.index(step) + goes_on :]
        if goes_on:
            return step
    step = PointStep(optimizer)
    if not (step.clusters or step.swaps):
        return None
    for epc, _ in step.clusters:
        epc.hooked = True
    stack.append(step)
    if step.swaps:
        _frame(optimizer)
    return step


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(optimizer, "steps_points_itself", False):
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
    closure = closure if callable(closure) else None
    if getattr(closure, "points_of", None) is optimizer:  # super().step(closure)
        return None
    step = _begin(optimizer, closure)
    if step is None:
        return None
    if closure is None:
        if not step.swaps:  # else within the frame, where the latents are in place
            step.gather()
        return None
    if len(args) > 1:
        return (args[0], step.wrap(closure), *args[2:]), kwargs
    return args, {**kwargs, "closure": step.wrap(closure)}


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = _open_step(optimizer)
    if step is not None and not step.frames:
        stack = _stack()
        del stack[stack.index(step) :]
        step.finish()


def _frame(optimizer: Optimizer) -> None:
    """Frame this optimizer's step, in the closure cell from which torch's wrapper takes it.

    torch's hooks do not frame it: none runs after a step, or another hook, that raises, and the latents must leave the
    hosts' weights then too. The wrapper looks into the cell after the hooks that run before a step, so that this holds
    for the step in progress too, and for every reference to the wrapper that somebody (a scheduler) has taken.
    """
    for cls in type(optimizer).__mro__:
        wrapper = cls.__dict__.get("step")
        if wrapper is not None and getattr(wrapper, "hooked", False):
            cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or ()))
            if "func" in cells and not hasattr(cells["func"].cell_contents, "frames_latents"):
                cells["func"].cell_contents = _framed(cells["func"].cell_contents)


def _framed(step_function: Callable[..., Any]) -> Callable[..., Any]:
    # Without its attributes: by one of them torch.compiler.disable would find, below, what a step that somebody has
    # disabled already is made of, and take that instead of this frame.
    @functools.wraps(step_function, updated=())
    def framed(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        step = _open_step(optimizer)
        if step is None or not step.swaps:
            return step_function(optimizer, *args, **kwargs)
        closure = args[0] if args else kwargs.get("closure")
        step.frames += 1
        try:
            step.enter()
            if closure is None and not step.holds_all():
                step.gather()
            result = step_function(optimizer, *args, **kwargs)
            step.finish()
        finally:
            step.frames -= 1
            if not step.frames:
                step.leave()
        return result

    eager: Callable[..., Any] = torch.compiler.disable(framed)  # a compiler would trace the points' bookkeeping
    eager.frames_latents = True  # type: ignore[attr-defined]
    return eager


@functools.cache
def install() -> None:
    """Register the global hooks, once a process; :func:`hbnn_plugin.apply` calls this."""
    register_optimizer_step_pre_hook(torch.compiler.disable(_before))
    register_optimizer_step_post_hook(torch.compiler.disable(_after))
