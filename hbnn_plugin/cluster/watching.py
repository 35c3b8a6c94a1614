"""Whether a weight trains while its point stands still: some optimizers never fire torch's step hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..geometry.looking import checksum
from .epc import EPC

__all__ = ["StepWatch"]

_FORWARDS = 20
_CHANGES = 3


class StepWatch:
    """Looks at one weight in its first training forwards, until an optimizer with hooks has stepped it."""

    def __init__(self) -> None:
        self._left = _FORWARDS
        self._changes = 0
        self._last: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to find out."""
        return not self._left

    def forget(self) -> None:
        """What happens now to the weight is not an optimizer's doing."""
        self._changes, self._last = 0, None

    def after_forward(self, weight: Tensor) -> None:
        """This is the weight as the forward leaves it, which may have edited it itself."""
        if self._last is not None:
            self._last = checksum(weight)

    def changes_without_step(self, epc: EPC, weight: Tensor) -> int:
        """Look at the weight before a forward; how often it has changed, once that is too often, and else 0."""
        if not (epc.training and torch.is_grad_enabled() and type(weight) is nn.Parameter and weight.requires_grad):
            return 0
        if epc.revision or epc.hooked:
            self._left = 0
            return 0
        now = checksum(weight)
        self._changes += self._last is not None and now != self._last
        self._left, self._last = self._left - 1, now
        if self._changes < _CHANGES:
            return 0
        self._left = 0
        return self._changes
