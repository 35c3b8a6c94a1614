"""Points step whenever an optimizer that holds their latents steps.

torch calls global hooks before and after every ``Optimizer.step``. Before it, the points' gradients are recovered from
the latents' (:mod:`hbnn_plugin.recovery`); after it, once the optimizer has succeeded, the points move
(:mod:`hbnn_plugin.rules`). Order ``"alternating"`` instead moves the points first and rewrites ``latent.grad`` to what
it would be at the new points (Algorithm 1 of [HBNN], with the upstream gradient at hand).

* A closure is wrapped: its first evaluation gives the gradients.
* Of nested steps (SAM, ZeroRedundancyOptimizer, wrappers) the innermost that sees a latent moves its point, once.
* A step that raises, or that GradScaler skips, moves nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .parametrization import EPC, alive
from .recovery import Recovered, pull_back, recover
from .rules import Move, move

__all__ = ["PointStep", "install", "moving_clusters", "step_points"]

_open = threading.local()


def moving_clusters(optimizer: Optimizer) -> list[tuple[EPC, dict[str, Any]]]:
    """The clusters whose latents this optimizer holds, each with the latent's parameter group; fixed ones left out."""
    clusters = [epc for epc in alive() if epc.settings.rule != "fixed"]
    if not clusters:
        return []
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return [(epc, groups[id(epc.latent)]) for epc in clusters if id(epc.latent) in groups]


class PointStep:
    """The points' part of one optimizer step: :meth:`gather`, then the optimizer, then :meth:`move`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.clusters = moving_clusters(optimizer)
        self._pending: list[tuple[Move, int]] = []
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._evaluations = 0

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the gradients gathered after its first evaluation."""

        def evaluate() -> Any:
            loss = closure()
            self._evaluations += 1
            if self._evaluations == 1:
                self.gather()
            elif any(epc.settings.order == "alternating" for epc, _ in self.clusters):
                raise RuntimeError(
                    f"order='alternating' moves the points before the weights, but {type(self.optimizer).__name__} "
                    "evaluates its closure more than once a step; use order='simultaneous'"
                )
            return loss

        return evaluate

    def covers(self, epc: EPC, gradient: Tensor) -> bool:
        """Whether this step has gathered this very gradient, unchanged since."""
        tensor, version = self._seen.get(id(epc), (None, -1))
        return tensor is gradient and version == gradient._version

    def gather(self) -> None:
        """Recover the points' gradients from the latents'. Under ``"alternating"``, move those points now."""
        due = [(epc, group) for epc, group in self.clusters if epc.latent.grad is not None]
        due = [(e, g) for e, g in due if not any(s.covers(e, _gradient(e)) for s in _stack() if s is not self)]
        if not due:
            return
        recovered = recover(
            [epc for epc, _ in due],
            [_gradient(epc) for epc, _ in due],
            grad_scale=getattr(self.optimizer, "grad_scale", None),
            found_inf=getattr(self.optimizer, "found_inf", None),
            upstream=any(epc.settings.order == "alternating" for epc, _ in due),
        )
        for (epc, group), found in zip(due, recovered):
            lr = group["lr"] * group.get("point_lr", epc.settings.point_lr)
            step = Move(epc, found.gradient, found.valid, lr, group)
            if epc.settings.order == "alternating":
                move([step])
                _rewrite_gradient(epc, found)
            else:
                self._pending.append((step, epc.moves))
            self._seen[id(epc)] = (_gradient(epc), _gradient(epc)._version)

    def move(self) -> None:
        """Move the points, but for those that a nested step has moved meanwhile."""
        pending, self._pending = self._pending, []
        move([step for step, moves_then in pending if step.epc.moves == moves_then])


def _gradient(epc: EPC) -> Tensor:
    gradient = epc.latent.grad
    assert gradient is not None
    return gradient


@torch.no_grad()
def _rewrite_gradient(epc: EPC, found: Recovered) -> None:
    assert found.upstream is not None
    gradient = _gradient(epc)
    rewritten = pull_back(epc, found.upstream).reshape(gradient.shape)
    valid = found.valid.expand(epc.shape).reshape(gradient.shape)
    gradient.copy_(torch.where(valid, rewritten.to(gradient.dtype), gradient))


def step_points(optimizer: Optimizer) -> None:
    """Move the points of the latents that ``optimizer`` holds, from the gradients these have now.

    For optimizers that do not fire torch's step hooks: call it right before ``optimizer.step()``.
    """
    step = PointStep(optimizer)
    step.gather()
    step.move()


def _stack() -> list[PointStep]:
    """The steps in progress on this thread, outermost first."""
    if not hasattr(_open, "steps"):
        _open.steps = []
    steps: list[PointStep] = _open.steps
    return steps


def begin(optimizer: Optimizer) -> PointStep | None:
    """Open the points' part of a step of ``optimizer``; None if it holds no latent."""
    stack = _stack()
    for depth, step in enumerate(stack):
        if step.optimizer is optimizer:  # left open by a step that raised
            del stack[depth:]
            break
    step = PointStep(optimizer)
    if not step.clusters:
        return None
    stack.append(step)
    return step


def end(optimizer: Optimizer) -> None:
    """Close the step of ``optimizer``: move its points."""
    stack = _stack()
    for depth in range(len(stack) - 1, -1, -1):
        if stack[depth].optimizer is optimizer:
            step = stack[depth]
            del stack[depth:]
            step.move()
            return


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(optimizer, "steps_points_itself", False):
        return None
    step = begin(optimizer)
    if step is None:
        return None
    # args[0] is the optimizer
    if len(args) > 1 and callable(args[1]):
        return (args[0], step.wrap(args[1]), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": step.wrap(kwargs["closure"])}
    step.gather()
    return None


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not getattr(optimizer, "steps_points_itself", False):
        end(optimizer)


@functools.cache
def install() -> None:
    """Register the global hooks, once a process; :func:`hbnn_plugin.apply` calls this."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)
