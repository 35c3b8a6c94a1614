"""Muon on a host's own weights: the control for points that move along the same directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbnn_plugin.geometry.spectral import orthogonal_factors

__all__ = ["Muon"]

MOMENTUM, RATE, DECAY = 0.95, 0.1, 0.02
"""As the points of ``apply(rule="spectral", point_lr=0.1, point_lr_power=0.5)``, the arms "√lr" of ``reproduce.py``:
Nesterov's momentum, multiple of √lr, decay per rate."""


class Muon(torch.optim.SGD):
    """w ← (1 − η·decay) w − ηO, η = 0.1 √lr, in parameter groups with ``"orthogonal": True``; in the others, SGD.

    O is the orthogonal factor of the gradient with momentum, filters as rows (Jordan et al., 2024). These groups' own
    momentum and weight decay are zero: their gradient is replaced by the direction, and SGD makes the step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; like Muon's, without a closure."""
        weights, rates, gradients = [], [], []
        for group in self.param_groups:
            for w in group["params"] if group.get("orthogonal") else ():
                momentum: Tensor = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                momentum.mul_(MOMENTUM).add_(w.grad)
                weights.append(w)
                rates.append(RATE * group["lr"] ** -0.5)
                gradients.append(w.grad.add(momentum, alpha=MOMENTUM).flatten(1))
        for w, rate, factor in zip(weights, rates, orthogonal_factors(gradients), strict=True):
            w.grad.copy_(factor.view_as(w)).add_(w, alpha=DECAY).mul_(rate)
        return super().step(closure)
