"""Muon on a host's own weights: the control for points that move along the same directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbnn_plugin.geometry.spectral import orthogonal_factors

__all__ = ["Muon"]

MOMENTUM, DECAY = 0.95, 0.02
"""Nesterov's, and decay per rate, as of spectral points."""


class Muon(torch.optim.SGD):
    """w ← (1 − η·decay) w − ηO, η = rate · lr**power, in parameter groups with ``"muon": (rate, power)``; else SGD.

    O is the orthogonal factor of the gradient with momentum, filters as rows (Jordan et al., 2024). These groups' own
    momentum and weight decay are zero: their gradient is replaced by the direction, and SGD makes the step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; like Muon's, without a closure."""
        weights, rates, gradients = [], [], []
        for group in self.param_groups:
            rate, power = group.get("muon") or (0.0, 0.0)
            for w in group["params"] if rate else ():
                momentum: Tensor = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                momentum.mul_(MOMENTUM).add_(w.grad)
                weights.append(w)
                rates.append(rate * group["lr"] ** (power - 1))  # SGD will multiply by lr
                gradients.append(w.grad.add(momentum, alpha=MOMENTUM).flatten(1))
        for w, rate, factor in zip(weights, rates, orthogonal_factors(gradients), strict=True):
            w.grad.copy_(factor.view_as(w)).add_(w, alpha=DECAY).mul_(rate)
        return super().step(closure)
