"""The points' part of an optimizer's step; ``optimizer/hooking.py`` says when it is due.

Before the optimizer moves the latents, the points' gradients are recovered from theirs (``optimizer/recovery.py``);
once it has succeeded, the points move (``optimizer/rules.py``). Order ``"alternating"`` also rewrites ``latent.grad``
in between, to what it would be at the points' new places (Algorithm 1 of [HBNN], with the upstream gradient at hand).

* A closure is wrapped: its first evaluation gives the gradients.
* Of nested steps (SAM, ZeroRedundancyOptimizer, a subclass that calls ``super().step()``) the innermost moves the
  point, once, at its own learning rate.
* In in-place mode (``cluster/swapping.py``) latents are in the hosts' weights meanwhile; a closure sees the mapped
  weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..cluster.epc import EPC, alive
from ..cluster.inplace import InPlace
from ..cluster.swapping import enter, leave
from ..geometry.joint_maps import pull_back
from ..geometry.looking import not_compiled
from ..host.sharding import sharded_like, whole
from .moves import Move, check_point_lr, point_rate
from .open_steps import in_progress
from .recovery import Recovered, recover
from .rules import move

__all__ = [
    "PointStep",
    "held_clusters",
    "require_clusters",
    "step_points",
]


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


def require_clusters(optimizer: Optimizer) -> list[tuple[EPC, dict[str, Any]]]:
    """:func:`held_clusters`; raises ValueError if there are none."""
    held = held_clusters(optimizer)
    if not held:
        raise ValueError(
            f"{type(optimizer).__name__} holds no latent weight: call hbnn_plugin.apply(model) first, and pass "
            "model.parameters()"
        )
    return held


@dataclass
class _Pending:
    """A point's move, gathered and not yet made."""

    epc: EPC
    found: Recovered
    group: dict[str, Any]
    gradient: Tensor
    """The latent's gradient that it came from, and its version then."""
    version: int
    revision_then: int
    state_after: list[Tensor] | None = None
    """Under ``"alternating"`` the point's state after the move: ``gradient`` is rewritten to be right there."""

    def comes_from(self, gradient: Tensor) -> bool:
        return self.gradient is gradient and self.version == gradient._version

    def due_move(self) -> Move | None:
        """Let the point arrive where it is known to, unless somebody has moved it since; else the move to be made."""
        if self.epc.revision != self.revision_then:
            return None
        if self.state_after is not None:
            self.epc.revision += 1
            _restore(self.epc, self.state_after)
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
        self._optimizer = weakref.ref(optimizer)
        held = held_clusters(optimizer)
        for epc, _ in held:
            epc.hooked = True
        self.clusters = [(epc, group) for epc, group in held if epc.settings.rule != "fixed"]
        self.swaps = self._left_outside([epc for epc, _ in held if isinstance(epc, InPlace)])
        self.frames = 0  # of this optimizer's step in progress: more than one inside super().step()
        self.framed = False  # whether one is going to open
        self.opened = False  # whether one has
        self.pending: dict[int, _Pending] = {}

    @property
    def optimizer(self) -> Optimizer:
        """Whose step this is."""
        optimizer = self._optimizer()
        assert optimizer is not None, "it is stepping"
        return optimizer

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the gradients gathered after its first evaluation."""
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            self.leave()
            loss = closure()
            self.enter(closure)
            evaluations += 1
            if evaluations == 1:
                self.gather()
            elif any(epc.settings.order == "alternating" for epc, _ in self.clusters):
                raise RuntimeError(
                    f"order='alternating' moves the points before the weights, but {type(self.optimizer).__name__} "
                    "evaluates its closure more than once a step; use order='simultaneous'"
                )
            return loss

        evaluate.points_of = self.optimizer  # type: ignore[attr-defined]
        return evaluate

    @staticmethod
    @not_compiled
    def _left_outside(clusters: list[InPlace]) -> list[InPlace]:
        """Those whose latent no step in progress has in its host; what a step that was cut off left undone is done."""
        inside = {epc for step in in_progress() if step.frames for epc in step.swaps if epc.swapped}
        outside = [epc for epc in clusters if epc not in inside]
        leave(outside)
        return outside

    @not_compiled
    def enter(self, closure: object = None) -> None:
        """Let the latents into the weights of in-place hosts; without a closure into those that have a gradient.

        No optimizer steps the others, and a graph in which they are saved may wait for its backward.
        """
        enter([epc for epc in self.swaps if closure is not None or epc.parameter.grad is not None])

    @not_compiled
    def leave(self) -> None:
        """Let the mapped weights back in."""
        leave(self.swaps)

    @not_compiled
    def gather(self) -> None:
        """Recover the points' gradients, but for those that a step in progress has from the very same gradients."""
        due = []
        for epc, group in self.clusters:
            check_point_lr(epc, group)
            gradient = epc.parameter.grad
            if gradient is None:  # somebody has taken it away within the step
                for step in in_progress():
                    step.pending.pop(id(epc), None)
            elif not self._take_over(epc, gradient, group):
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
            pending = _Pending(epc, found, group, gradient, gradient._version, epc.revision)
            if epc.settings.order == "alternating":
                before = _state(epc)
                _make([pending])
                _rewrite(gradient, epc, found)
                pending.state_after, pending.version = _state(epc), gradient._version
                pending.revision_then = epc.revision
                _restore(epc, before)
            self.pending[id(epc)] = pending

    def _take_over(self, epc: EPC, gradient: Tensor, group: dict[str, Any]) -> bool:
        for step in reversed(in_progress()):
            pending = step.pending.pop(id(epc), None)
            if pending is not None and pending.comes_from(gradient):
                pending.group = group
                self.pending[id(epc)] = pending
                return True
            if pending is not None and pending.gradient is gradient and pending.state_after is not None:
                _bring_back(pending, pending.state_after)
        return False

    def holds_all(self) -> bool:
        """Whether every gradient that is there now has been gathered here, and nothing else."""
        gradients = [(self.pending.get(id(epc)), epc.parameter.grad) for epc, _ in self.clusters]
        there = [(pending, gradient) for pending, gradient in gradients if gradient is not None]
        gathered = all(pending is not None and pending.comes_from(gradient) for pending, gradient in there)
        return gathered and 0 < len(there) == len(self.pending)

    @not_compiled
    def finish(self) -> None:
        """Move the points."""
        pending, self.pending = self.pending, {}
        _make(pending.values())


def _make(moves: Iterable[_Pending]) -> None:
    move([due for pending in moves if (due := pending.due_move()) is not None])


def _moving(epc: EPC) -> list[Tensor]:
    """What a point's move changes."""
    buffers = (epc.point, epc.momentum, epc.mean_square, epc.squares_weight, epc.steps)
    return [tensor for tensor in buffers if tensor is not None]


def _state(epc: EPC) -> list[Tensor]:
    return [tensor.clone() for tensor in _moving(epc)]


@torch.no_grad()
def _restore(epc: EPC, state: list[Tensor]) -> None:
    for tensor, value in zip(_moving(epc), state):
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


def _bring_back(pending: _Pending, state_after: list[Tensor]) -> None:
    """Undo :func:`_rewrite` in a gradient that somebody has changed since, such as clipped."""
    epc, here = pending.epc, _state(pending.epc)
    _restore(epc, state_after)
    (found,) = recover([epc], [pending.gradient], upstream=True)
    _restore(epc, here)
    _rewrite(pending.gradient, epc, found)


def step_points(optimizer: Optimizer) -> None:
    """Move the points of the latents that ``optimizer`` holds, from the gradients these have now.

    For optimizers that do not fire torch's step hooks: call it right before ``optimizer.step()``.

    Raises:
        ValueError: ``optimizer`` holds no latent; it fires torch's step hooks; or a latent is in in-place mode, where
            the optimizer's step itself has to be framed.
    """
    held = require_clusters(optimizer)
    if getattr(getattr(type(optimizer), "step", None), "hooked", False):
        raise ValueError(
            f"{type(optimizer).__name__} fires torch's step hooks, so that its points move by themselves: leave "
            "step_points out"
        )
    inplace = next((epc for epc, _ in held if isinstance(epc, InPlace)), None)
    if inplace is not None:
        raise ValueError(
            f"{inplace.name} is in in-place mode, which needs an optimizer that fires torch's step hooks: let "
            f"{type(optimizer).__name__} call super().__init__(), or apply with mode='parametrize'"
        )
    step = PointStep(optimizer)
    step.gather()
    step.finish()
