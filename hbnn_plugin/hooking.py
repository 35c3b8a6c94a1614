"""When points step: whenever a torch optimizer that holds their latents does.

torch calls global hooks before every ``Optimizer.step``. The first time they see an optimizer's class, its step is
framed: as the frame opens, inside all hooks, the points' gradients are gathered; as the step has succeeded, the points
move; as it closes, also after an error, latents leave the hosts' weights (in-place mode). A step that raises, or that
GradScaler skips, moves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .stepping import PointStep, in_progress, open_step

__all__ = ["install"]


def _begin(optimizer: Optimizer, closure: object) -> PointStep | None:
    """Open the points' part of a step of ``optimizer``; None if it holds no latent."""
    step = open_step(optimizer)
    if step is not None:  # inside super().step(), or after a step that raised
        goes_on = step.frames > 0 or (closure is None and step.holds_all())
        del in_progress()[in_progress().index(step) + goes_on :]
        if goes_on:
            return step
    step = PointStep(optimizer)
    for epc, _ in step.held:
        epc.hooked = True
    if not (step.clusters or step.swaps):
        return None
    step.framed = _frame(optimizer)
    if step.swaps and not step.framed:
        raise RuntimeError(
            f"{step.swaps[0].name} is in in-place mode, which has to frame the optimizer's step, and "
            f"{type(optimizer).__name__}.step has been replaced by a function that hides torch's own: decorate it with "
            "functools.wraps, use hbnn_plugin.ClusterSGD, ClusterAdam or ClusterAdamW, or apply with mode='parametrize'"
        )
    in_progress().append(step)
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
        if not step.framed:
            step.gather()
        return None
    if len(args) > 1:
        return (args[0], step.wrap(closure), *args[2:]), kwargs
    return args, {**kwargs, "closure": step.wrap(closure)}


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = open_step(optimizer)
    if step is not None and not step.frames:
        del in_progress()[in_progress().index(step) :]
        step.finish()


def _cell_of_step() -> tuple[CodeType, int]:
    """The code of the wrapper that torch puts around ``step``, and in which of its cells the step is."""

    def probe() -> None: ...

    wrapper = Optimizer.profile_hook_step(probe)
    cells = [cell.cell_contents for cell in wrapper.__closure__ or ()]
    return wrapper.__code__, cells.index(probe)


_WRAPPER, _CELL = _cell_of_step()


def _frame(optimizer: Optimizer) -> bool:
    """Frame this optimizer's step, in the closure cell from which torch's wrapper takes it; False if that is hidden.

    torch's hooks cannot do this: none runs after a step, or another hook, that raises; and other hooks, or a subclass's
    ``step`` before it calls ``super().step()``, may still clip the gradients after the global ones. The wrapper looks
    into the cell after the hooks that run before a step, so that this holds for the step in progress too, and for every
    reference to the wrapper that somebody (a scheduler) has taken.
    """
    wrapped = []
    for cls in type(optimizer).__mro__:
        step = cls.__dict__.get("step")
        if step is None or cls is Optimizer or not issubclass(cls, Optimizer):
            continue
        wrapper = step
        while wrapper is not None and getattr(wrapper, "__code__", None) is not _WRAPPER:
            wrapper = getattr(wrapper, "__wrapped__", None)
        wrapped.append(wrapper is not None)
        if wrapper is not None:
            cell = wrapper.__closure__[_CELL]
            if not hasattr(cell.cell_contents, "frames_points"):
                cell.cell_contents = _framed(cell.cell_contents)
        elif not hasattr(step, "frames_points"):  # torch wraps it when one is built: until then a base, for super()
            cls.step = _framed(step)  # type: ignore[method-assign]
    return next(iter(wrapped), False)


def _framed(step_function: Callable[..., Any]) -> Callable[..., Any]:
    # Without its attributes: by one of them torch.compiler.disable would find, below, what a step that somebody has
    # disabled already is made of, and take that instead of this frame.
    @functools.wraps(step_function, updated=())
    def framed(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        step = open_step(optimizer)
        if step is None:
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
    eager.frames_points = True  # type: ignore[attr-defined]
    return eager


@functools.cache
def install() -> None:
    """Register the global hooks, once a process; :func:`hbnn_plugin.apply` calls this."""
    register_optimizer_step_pre_hook(torch.compiler.disable(_before))
    register_optimizer_step_post_hook(torch.compiler.disable(_after))
