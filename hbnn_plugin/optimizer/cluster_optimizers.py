"""Optimizers that step the points themselves, for those who prefer to see it in their training script.

``ClusterSGD(model.parameters(), lr=0.1, momentum=0.9)`` does what ``torch.optim.SGD`` does to every parameter, and to
the points what :func:`hbnn_plugin.apply` was told (with geoopt's manifolds for the Riemannian rules); the automatic
stepping stands back. Both modes will do. A parameter group may carry ``point_lr``, which overrides that of
:func:`hbnn_plugin.apply`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .stepping import PointStep, require_clusters

__all__ = ["ClusterAdam", "ClusterAdamW", "ClusterSGD"]


class _StepsPoints(Optimizer):
    """Mixed in before a torch optimizer."""

    steps_points_itself = True

    def __init__(self, params: Any, *args: Any, point_lr: float | None = None, **kwargs: Any) -> None:
        if point_lr is not None and not 0 <= point_lr < math.inf:
            raise ValueError(f"point_lr must be a finite number from 0, not {point_lr!r}")
        super().__init__(params, *args, **kwargs)
        require_clusters(self)
        if point_lr is not None:
            self.defaults["point_lr"] = point_lr  # for groups that are added later
            for group in self.param_groups:
                group.setdefault("point_lr", point_lr)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "point_lr" in self.defaults:  # the state may be of an optimizer that knows none
            for group in self.param_groups:
                group.setdefault("point_lr", self.defaults["point_lr"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the parameters, as the base class makes it, and of the points."""
        points = PointStep(self)
        base_step = super().step.__func__  # type: ignore[attr-defined]
        if getattr(base_step, "hooked", False):  # this step's hooks have been called already
            base_step = base_step.__wrapped__
        try:
            points.enter(closure)
            if closure is None:
                points.gather()
            else:
                closure = points.wrap(closure)
            loss = base_step(self, closure)
            points.finish()
        finally:
            points.leave()
        return loss


class ClusterSGD(_StepsPoints, torch.optim.SGD):
    """torch.optim.SGD that moves the points too, of a model that :func:`hbnn_plugin.apply` was called on before.

    Args:
        params, *args, **kwargs: as of torch.optim.SGD.
        point_lr: overrides that of ``apply``, in every parameter group that has none of its own.

    Raises:
        ValueError: no latent weight is among ``params``, or ``point_lr`` is not a finite number ≥ 0.
    """


class ClusterAdam(_StepsPoints, torch.optim.Adam):
    """torch.optim.Adam that moves the points too, of a model that :func:`hbnn_plugin.apply` was called on before.

    Args:
        params, *args, **kwargs: as of torch.optim.Adam.
        point_lr: overrides that of ``apply``, in every parameter group that has none of its own.

    Raises:
        ValueError: no latent weight is among ``params``, or ``point_lr`` is not a finite number ≥ 0.
    """


class ClusterAdamW(_StepsPoints, torch.optim.AdamW):
    """torch.optim.AdamW that moves the points too, of a model that :func:`hbnn_plugin.apply` was called on before.

    Args:
        params, *args, **kwargs: as of torch.optim.AdamW.
        point_lr: overrides that of ``apply``, in every parameter group that has none of its own.

    Raises:
        ValueError: no latent weight is among ``params``, or ``point_lr`` is not a finite number ≥ 0.
    """
