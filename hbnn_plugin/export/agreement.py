"""Whether another runtime computes what torch does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Agreement", "agreement"]


class Agreement(NamedTuple):
    """Another runtime's logits against torch's, on the same input.

    Attributes:
        rows: how many predictions were compared: N for logits of shape (N, classes).
        same_top1: how often both chose the same class.
        difference: the largest difference of two logits.
        largest: the largest absolute logit of torch.
    """

    rows: int
    same_top1: int
    difference: float
    largest: float

    def __str__(self) -> str:
        relative = self.difference / self.largest if self.largest else float("inf" if self.difference else 0)
        return (
            f"same top-1 {self.same_top1} of {self.rows}, logits differ by at most {self.difference:.3g}, "
            f"{relative:.2g} of the largest"
        )

    def require(self, tolerance: float | None, runtime: str) -> None:
        """Raise ValueError unless every top-1 is the same and logits differ by ``tolerance`` × the largest at most."""
        if tolerance is None:
            return
        if self.same_top1 != self.rows or not self.difference <= tolerance * self.largest:
            raise ValueError(
                f"{runtime} does not compute what torch does: {self}; tolerance {tolerance:g}. Rounding may turn the "
                "sign of an activation next to zero; if that is all, another example helps, or tolerance=None, which "
                "checks nothing"
            )


def agreement(found: Tensor, expected: Tensor) -> Agreement:
    """Compare logits of shape (N, classes, ...) with torch's."""
    same = found.argmax(1) == expected.argmax(1)
    difference = (found - expected).abs().max()
    return Agreement(
        same.numel(), int(same.sum()), float(difference), float(torch.linalg.vector_norm(expected, torch.inf))
    )
