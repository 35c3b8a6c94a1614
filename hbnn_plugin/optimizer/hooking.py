"""When points step: whenever a torch optimizer that holds their latents does.

torch calls global hooks before every ``Optimizer.step``. When an optimizer that holds a latent first steps, its class's
step is framed: as the frame opens, inside all hooks, the points' gradients are gathered; as the step has succeeded, the
points move; as it closes, also after an error, latents leave the hosts' weights (in-place mode). A step that raises, or
that GradScaler skips, moves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..cluster.inplace import InPlace
from ..geometry.looking import not_compiled
from .open_steps import begin, end, end_inside, open_step
from .stepping import PointStep

__all__ = ["install"]


def _begin(optimizer: Optimizer, closure: object) -> PointStep | None:
    """Open the points' part of a step of ``optimizer``; None if it holds no latent."""
    step = open_step(optimizer)
    if step is not None:  # inside super().step(), or after a step that raised
        if step.frames > 0 or (closure is None and step.holds_all()):
            end_inside(step)
            return step
        end(step)
    step = PointStep(optimizer)
    if not (step.clusters or step.swaps):
        return None
    begin(step)
    step.framed = _frame(type(optimizer))
    return step


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if getattr(optimizer, "steps_points_itself", False):
        return None
    closure = _closure_in(args[1:], kwargs)  # args[0] is the optimizer
    if getattr(closure, "points_of", None) is optimizer:  # super().step(closure)
        return None
    step = _begin(optimizer, closure)
    if step is None or step.swaps or step.framed:  # the frame gathers, after all hooks; but it may be hidden
        return None
    if closure is None:
        step.gather()
        return None
    args, kwargs = _wrapped(step, args[1:], kwargs)
    return (optimizer, *args), kwargs


def _closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    closure = args[0] if args else kwargs.get("closure")
    return closure if callable(closure) else None


def _wrapped(step: PointStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step with its closure, if there is one, wrapped."""
    closure = _closure_in(args, kwargs)
    if closure is None or getattr(closure, "points_of", None) is step.optimizer:
        return args, kwargs
    return ((step.wrap(closure), *args[1:]), kwargs) if args else (args, {**kwargs, "closure": step.wrap(closure)})


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    step = open_step(optimizer)
    if step is None or step.frames:
        return
    end(step)
    if step.swaps and not step.opened:
        raise RuntimeError(
            f"{step.swaps[0].name} is in in-place mode, and this step has trained the bare host: "
            f"{type(optimizer).__name__}.step has been replaced by a function that hides torch's own. Decorate it with "
            "functools.wraps, use hbnn_plugin.ClusterSGD, ClusterAdam or ClusterAdamW, or apply with mode='parametrize'"
        )
    step.finish()


def _cell_of_step() -> tuple[CodeType, int]:
    """The code of the wrapper that torch puts around ``step``, and in which of its cells the step is."""

    def probe() -> None: ...

    wrapper = Optimizer.profile_hook_step(probe)
    cells = [cell.cell_contents for cell in wrapper.__closure__ or ()]
    return wrapper.__code__, cells.index(probe)


_WRAPPER, _CELL = _cell_of_step()


def _frame(optimizer_class: type[Optimizer]) -> bool:
    """Frame the class's step, in the closure cell from which torch's wrapper takes it, and that of its bases.

    Returns whether the frame will open in a step that is about to begin, as far as the class tells.

    torch's hooks cannot do this: none runs after a step, or another hook, that raises; and other hooks, or a subclass's
    ``step`` before it calls ``super().step()``, may still clip the gradients after the global ones. The wrapper looks
    into the cell after the hooks that run before a step, so that this holds for the step in progress too, and for every
    reference to the wrapper that somebody (a scheduler) has taken.
    """
    found: list[bool] = []
    for cls in optimizer_class.__mro__:
        step = cls.__dict__.get("step")
        if step is None or cls is Optimizer or not issubclass(cls, Optimizer):
            continue
        wrapper = step
        while wrapper is not None and getattr(wrapper, "__code__", None) is not _WRAPPER:
            wrapper = getattr(wrapper, "__wrapped__", None)
        if wrapper is not None:
            cell = wrapper.__closure__[_CELL]
            if not hasattr(cell.cell_contents, "frames_points"):
                cell.cell_contents = _framed(cell.cell_contents)
        elif isinstance(step, FunctionType) and not hasattr(step, "frames_points"):
            # torch wraps it when one is built: until then it is a base, for super()
            cls.step = _framed(step)  # type: ignore[method-assign]
        found.append(wrapper is not None)
    return found[:1] == [True]


def _framed(step_function: Callable[..., Any]) -> Callable[..., Any]:
    # Without its attributes: by one of them torch.compiler.disable would find, below, what a step that somebody has
    # disabled already is made of, and take that instead of this frame.
    @functools.wraps(step_function, updated=())
    def framed(optimizer: Optimizer, /, *args: Any, **kwargs: Any) -> Any:
        step = open_step(optimizer)
        if step is None:
            return step_function(optimizer, *args, **kwargs)
        args, kwargs = _wrapped(step, args, kwargs)
        step.frames, step.opened = step.frames + 1, True
        try:
            closure = _closure_in(args, kwargs)
            step.enter(closure)
            if closure is None:
                step.gather()
            result = step_function(optimizer, *args, **kwargs)
            step.finish()
        finally:
            step.frames -= 1
            if not step.frames:
                step.leave()
        return result

    # The step itself may be compiled; the bookkeeping in PointStep is not.
    eager: Callable[..., Any] = torch.compiler.disable(framed, recursive=False)
    eager.frames_points = True  # type: ignore[attr-defined]
    return eager


@functools.cache
def install() -> None:
    """Register the global hooks, once a process; :func:`hbnn_plugin.apply` calls this."""
    register_optimizer_step_pre_hook(not_compiled(_before))
    register_optimizer_step_post_hook(not_compiled(_after))


InPlace.when_loaded = staticmethod(install)  # type: ignore[method-assign]
