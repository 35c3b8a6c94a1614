r"""A point's step to be made, and how large it is.

η is point_lr · lr ** point_lr_power, lr the weight's learning rate. The power is 1, for spectral points ¾: their steps
shrink with η alone, a weight's with its gradient too. At ½ they are still restless at the end of training on a host
whose gradients do not vanish (ReCU), at 1 they read less there (README, "Beyond the paper").

Under an optimizer of Adam's kind (its group has ``betas``, or ``eps`` and one of :data:`_SQUARES`) the weights move
by about lr a coordinate however large their gradient is. Under the rules ``mobius`` and ``riemannian`` g is then
divided by the running root mean square of its coordinates, one number a point, with the group's own β₂ (or ``alpha``,
``rho``; else .999) and eps, so that the point's coordinates move by about η too; ``mobius`` is then p ← p ⊕ (−ηg),
since a g of norm √n lies outside the domain of ⊗. Spectral points take steps of a fixed length as the weights do: η
is then point_lr · lr · √n, whatever point_lr_power says, with √n such that their coordinates move by about point_lr ·
lr.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cluster.epc import EPC
from ..geometry.spectral import longer_side
from .matrices import coordinates
from .recovery import Recovered

__all__ = ["ADAM_BETAS", "ADAM_EPS", "Move", "check_point_lr", "is_adaptive", "point_rate", "root_mean_square"]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
_SQUARES = ("alpha", "rho", "lr_decay", "beta2_decay")
"""What a group without ``betas`` has beside ``eps`` if its optimizer divides by running squares: torch's RMSprop,
Adadelta, Adagrad and Adafactor."""


class Move(NamedTuple):
    """One cluster's step to be made."""

    epc: EPC
    found: Recovered
    """Its gradient may be overwritten."""
    lr: float | Tensor
    """η."""
    group: dict[str, Any]
    """The parameter group of the latent."""

    @property
    def kept(self) -> float | Tensor:
        """What point_decay leaves of the point, 1 − η·point_decay, whichever way the step goes (``maximize``)."""
        decay = self.epc.settings.point_decay
        if isinstance(self.lr, Tensor):
            return (1 - self.lr.abs() * decay).clamp(min=0.0)
        return max(1 - abs(self.lr) * decay, 0.0)


def check_point_lr(epc: EPC, group: Mapping[str, Any]) -> None:
    """Raise ValueError if this parameter group's ``point_lr`` is none."""
    factor = group.get("point_lr", 0.0)
    if isinstance(factor, Tensor):  # on a GPU looking would wait
        return
    if not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
        raise ValueError(
            f"{epc.name}: its weight's parameter group has point_lr={factor!r}; it must be a finite number from 0"
        )


def point_rate(epc: EPC, group: Mapping[str, Any]) -> float | Tensor:
    """η of a point whose weight is in this parameter group, which has an ``lr``."""
    lr: float | Tensor = group["lr"]
    factor: float = group.get("point_lr", epc.settings.point_lr)
    if epc.settings.rule == "spectral" and is_adaptive(group):
        columns = math.prod(epc.point.shape[d] for d in coordinates(epc))
        return lr * factor * math.sqrt(longer_side(epc.point.numel() // columns, columns))
    # a schedule that ends at zero may end a rounding below
    power = epc.settings.point_lr_power
    return factor * (lr.sign() * lr.abs() ** power if isinstance(lr, Tensor) else math.copysign(abs(lr) ** power, lr))


def is_adaptive(group: Mapping[str, Any]) -> bool:
    """Whether its optimizer is of Adam's kind."""
    return "betas" in group or ("eps" in group and not group.keys().isdisjoint(_SQUARES))


def root_mean_square(step: Move) -> Tensor:
    """√m̂ + eps, one number a point, m the running mean square of g's coordinates with the group's β₂."""
    epc, group, valid = step.epc, step.group, step.found.valid
    beta = float(group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho", ADAM_BETAS[1])))
    eps = group.get("eps", ADAM_EPS)
    gg = step.found.products[2].reshape(epc.scalar_shape)
    now = (gg * (epc.point_count / epc.point.numel())).to(epc.mean_square.dtype)
    for mean, latest in ((epc.mean_square, now), (epc.squares_weight, torch.ones_like(now))):
        mean.copy_(torch.where(valid, mean.lerp(latest, 1 - beta), mean))
    root = (epc.mean_square / epc.squares_weight).sqrt() + (float(eps) if isinstance(eps, (int, float)) else ADAM_EPS)
    return torch.where(valid, root, 1.0)  # before the first valid gradient it is 0/0
