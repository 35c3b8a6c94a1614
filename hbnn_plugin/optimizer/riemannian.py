"""Points that move as geoopt's RiemannianSGD and RiemannianAdam move them, on geoopt's manifolds."""

from __future__ import annotations

import geoopt
import torch
from torch import Tensor

from ..cluster.epc import EPC
from ..geometry import ball
from ..geometry.exponential import mobius_scale
from .matrices import flatten, unflatten
from .moves import ADAM_BETAS, ADAM_EPS, Move, is_adaptive, root_mean_square

__all__ = ["follow_geodesic"]

# Of radius 1, the home of √r p. The exact ball: its retraction is the exponential map; PoincareBall's is not.
_MANIFOLDS = {"ball": geoopt.PoincareBallExact, "sphere": geoopt.SphereExact}


class _OnManifold:
    """p, g and m as geoopt sees them: the point is √r p, on the manifold of radius 1; tangents keep p's units."""

    def __init__(self, epc: EPC, g: Tensor) -> None:
        self.epc = epc
        root = epc.radius**0.5
        self.root = root.reshape(-1, 1).to(g) if isinstance(root, Tensor) else root
        self.manifold = _MANIFOLDS[epc.settings.space]().to(g)
        self.point = self.root * flatten(epc.point, epc.dims)
        self.gradient = self.manifold.egrad2rgrad(self.point, flatten(g, epc.dims))
        self.momentum = None if epc.momentum is None else flatten(epc.momentum, epc.dims)

    def follow(self, direction: Tensor, lr: float | Tensor) -> None:
        """Follow the geodesic along −η·direction and carry the momentum along."""
        step = -lr * self.root * direction
        if self.momentum is None:
            point = self.manifold.retr(self.point, step)
        else:
            point, momentum = self.manifold.retr_transp(self.point, step, self.momentum)
            assert self.epc.momentum is not None
            self.epc.momentum.copy_(unflatten(momentum, self.epc.point.shape, self.epc.dims))
        if self.epc.settings.space == "ball":
            norm = point.norm(dim=-1, keepdim=True)
            point = point * ((1 - ball.MARGIN) / norm.clamp(min=1e-30)).clamp(max=1.0)
        self.epc.point.copy_(unflatten(point / self.root, self.epc.point.shape, self.epc.dims))


def follow_geodesic(step: Move) -> None:
    """Make a step by the rules ``riemannian`` and ``riemannian-adam``."""
    epc, g = step.epc, step.found.gradient
    state = [t for t in (epc.point, epc.momentum, epc.mean_square, epc.squares_weight) if t is not None]
    before = None if step.found.all_valid else [t.clone() for t in state]
    if epc.settings.point_decay:
        epc.point.copy_(mobius_scale(step.kept, epc.point, epc.radius, epc.dims))
    if epc.settings.rule == "riemannian-adam":
        _riemannian_adam(epc, g, step.lr)
    else:
        _riemannian(epc, g.div_(root_mean_square(step)) if is_adaptive(step.group) else g, step.lr)
    if before is not None:
        for now, then in zip(state, before):
            now.copy_(torch.where(step.found.valid, now, then))


def _riemannian(epc: EPC, g: Tensor, lr: float | Tensor) -> None:
    on = _OnManifold(epc, g)
    if on.momentum is None:
        on.follow(on.gradient, lr)
    else:
        on.momentum = epc.settings.point_momentum * on.momentum + on.gradient
        on.follow(on.momentum, lr)


def _riemannian_adam(epc: EPC, g: Tensor, lr: float | Tensor) -> None:
    on = _OnManifold(epc, g)
    assert on.momentum is not None
    beta1, beta2 = ADAM_BETAS
    on.momentum = beta1 * on.momentum + (1 - beta1) * on.gradient
    square = on.manifold.component_inner(on.point, on.gradient)
    epc.mean_square.lerp_(square[:, :1].reshape(epc.scalar_shape), 1 - beta2)
    epc.squares_weight.lerp_(torch.ones_like(epc.squares_weight), 1 - beta2)
    denominator = (epc.mean_square / epc.squares_weight).reshape(-1, 1).sqrt().add(ADAM_EPS)
    on.follow(on.momentum / (1 - beta1 ** epc.steps.to(g.dtype)) / denominator, lr)
