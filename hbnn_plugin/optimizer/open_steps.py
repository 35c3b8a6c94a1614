"""The steps of optimizers that are in progress, thread by thread: they may be nested."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..geometry.looking import not_compiled

if TYPE_CHECKING:
    from .stepping import PointStep

__all__ = ["begin", "end", "end_inside", "in_progress", "open_step"]


class _Open(threading.local):
    def __init__(self) -> None:
        # After a step that raised, its own stays, for whoever repeats it with the same gradients; but no longer than
        # the optimizer: a notebook that starts anew after an interrupt has no room for the old model.
        self.steps: weakref.WeakKeyDictionary[Optimizer, PointStep] = weakref.WeakKeyDictionary()


_open = _Open()


def in_progress() -> list[PointStep]:
    """The steps in progress on this thread, outermost first."""
    return list(_open.steps.values())


@not_compiled
def open_step(optimizer: Optimizer) -> PointStep | None:
    """The step of this optimizer in progress on this thread."""
    return _open.steps.get(optimizer)


def begin(step: PointStep) -> None:
    """Put a step in progress on this thread, inside those that are."""
    _open.steps[step.optimizer] = step


def end(step: PointStep) -> None:
    """Remove this step, and all inside it."""
    end_inside(step)
    del _open.steps[step.optimizer]


def end_inside(step: PointStep) -> None:
    """Remove all steps inside this one."""
    steps = in_progress()
    for inner in steps[steps.index(step) + 1 :]:
        del _open.steps[inner.optimizer]
