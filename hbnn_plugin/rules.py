r"""How a point moves, given its gradient g = ∂L/∂p and its learning rate η.

* ``mobius``: p ← p ⊕ ((−η) ⊗ g), [HBNN] Eq. 9; on the sphere, where that step moves nothing, p ← exp_p(−η g_tangent).
* ``riemannian``: geoopt's RiemannianSGD (without dampening or Nesterov): g is turned into the Riemannian gradient, the
  point follows its geodesic, momentum is transported along.
* ``riemannian-adam``: geoopt's RiemannianAdam with betas (0.9, 0.999) and eps 1e-8.
* ``spectral`` (not in the paper): p ← p ⊕ (−ηO), O the orthogonal factor of the layer's g with Nesterov momentum 0.95,
  as a matrix (output units × coordinates): each filter's point moves by about η, and no direction that the layer's
  filters share outruns the others (:mod:`hbnn_plugin.spectral`). With ``relative=True`` by about ηs.
  Its η is ``point_lr`` times the *square root* of the weight's learning rate: where steps shrink with their gradient,
  what noise does to a weight goes with √lr; steps of fixed length have to go with √lr themselves to come to rest
  together with the weights, and not long before.
* ``fixed``: not at all.

Under an optimizer of Adam's kind (its group has ``betas`` or ``eps``) the weights move by about η a coordinate however
large their gradient is. For the first two rules g is then divided by the running root mean square of its coordinates,
one number a point, with the group's own β₂ (or ``alpha``, ``rho``; else .999) and eps, so that the point's coordinates
move by about η too; ``mobius`` is then p ← p ⊕ (−ηg), since a g of norm √n lies outside the domain of ⊗.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor

from .ball import MARGIN
from .cluster import EPC
from .epc import mobius_scale
from .passes import combine, inner
from .recovery import Recovered, radii_of
from .spectral import orthogonal_factor

__all__ = ["Move", "move", "point_rate"]

# Of radius 1, the home of √r p. The exact ball: its retraction is the exponential map; PoincareBall's is not.
_MANIFOLDS = {"ball": geoopt.PoincareBallExact, "sphere": geoopt.SphereExact}
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8
_SPECTRAL_MOMENTUM = 0.95


class Move(NamedTuple):
    """One cluster's step to be made."""

    epc: EPC
    found: Recovered
    """Its gradient is overwritten."""
    lr: float | Tensor
    """η."""
    group: dict[str, Any]
    """The parameter group of the latent."""

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer is of Adam's kind."""
        return "betas" in self.group or "eps" in self.group

    @property
    def is_plain(self) -> bool:
        """Whether the step needs nothing but the point and its gradient."""
        settings = self.epc.settings
        return settings.rule == "mobius" and not settings.point_momentum and not settings.point_decay


def point_rate(epc: EPC, group: Mapping[str, Any]) -> float | Tensor:
    """η of a point whose weight is in this parameter group, which has an ``lr``."""
    lr: float | Tensor = group["lr"]
    if epc.settings.rule == "spectral":
        lr = lr**0.5
    return lr * group.get("point_lr", epc.settings.point_lr)  # type: ignore[no-any-return]


@torch.no_grad()
def move(steps: Sequence[Move]) -> None:
    """Make the steps, in place."""
    for step in steps:
        step.epc.moves += 1
        step.epc.steps += step.found.valid.any()
        if not step.is_plain:
            _move_one(step)
    plain = sorted((step for step in steps if step.is_plain), key=_kind)
    for _, together in groupby(plain, key=_kind):
        _move_plain(list(together))


def _kind(step: Move) -> tuple[str, str]:
    return step.epc.settings.space, str(step.epc.point.device)


def _move_plain(steps: list[Move]) -> None:
    """The Möbius rule without momentum and decay, with the scalars of all clusters worked out together."""
    sizes = [step.epc.points for step in steps]
    products = torch.cat([step.found.products.flatten(1) for step in steps], dim=1)
    scale, eta = torch.cat([_scale_and_rate(step).to(products) for step in steps], dim=1)
    pp, pg, gg = products[0], scale * products[1], scale * scale * products[2]
    radii = torch.cat([radii_of(step.epc, products) for step in steps])
    a, b = steps[0].epc.settings.geometry.point_step(pp, pg, gg, eta, radii)
    # ‖g‖² may overflow where no coordinate does: such a point holds still
    moves = torch.cat([step.found.valid.flatten() for step in steps]) & gg.isfinite()
    a, b = torch.where(moves, a, 1.0), torch.where(moves, b * scale, 0.0)
    for step, *coefficients in zip(steps, a.split(sizes), b.split(sizes)):
        p, g = step.epc.point, step.found.gradient
        combine([c.reshape(step.found.valid.shape) for c in coefficients], (p, g), out=p)


def _scale_and_rate(step: Move) -> Tensor:
    """What g is multiplied by, and η for what comes out: (2, points)."""
    one = step.found.products.new_ones(step.epc.points)
    if not step.adaptive:
        return torch.stack([one, one * step.lr])
    # of norm √n it would lie outside ⊗'s domain: scale first, p ⊕ ((−1) ⊗ ηg), the same to first order
    return torch.stack([step.lr / _root_mean_square(step).flatten(), one])


def _move_one(step: Move) -> None:
    epc, g, valid = step.epc, step.found.gradient, step.found.valid
    settings = epc.settings
    state = [t for t in (epc.point, epc.momentum, epc.mean_square) if t is not None]
    before = None if valid.is_cpu and bool(valid.all()) else [t.clone() for t in state]
    if settings.point_decay:
        kept = 1 - step.lr * settings.point_decay
        kept = kept.clamp(min=0.0) if isinstance(kept, Tensor) else max(kept, 0.0)
        epc.point.copy_(mobius_scale(kept, epc.point, epc.radius, epc.dims))
    if settings.rule == "riemannian-adam":
        _riemannian_adam(epc, g, step.lr)
    elif settings.rule == "spectral":
        _spectral(epc, g, step.lr)
    else:
        if step.adaptive:
            g.div_(_root_mean_square(step))
        if settings.rule == "mobius":
            _mobius(epc, g, step.lr, step.adaptive)
        else:
            _riemannian(epc, g, step.lr)
    if before is not None:
        for now, then in zip(state, before):
            now.copy_(torch.where(valid, now, then))


def _root_mean_square(step: Move) -> Tensor:
    """√m̂ + eps, one number a point, m the running mean square of g's coordinates with the group's β₂."""
    epc, group, valid = step.epc, step.group, step.found.valid
    beta = float(group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho", _ADAM_BETAS[1])))
    eps = group.get("eps", _ADAM_EPS)
    now = (step.found.products[2] * (epc.points / epc.point.numel())).to(epc.mean_square.dtype)
    epc.mean_square.copy_(torch.where(valid, epc.mean_square.lerp(now, 1 - beta), epc.mean_square))
    corrected = epc.mean_square / (1 - beta ** epc.steps.to(epc.mean_square.dtype))
    return corrected.sqrt() + (float(eps) if isinstance(eps, (int, float)) else _ADAM_EPS)


def _accumulate(epc: EPC, g: Tensor) -> Tensor:
    """Heavy-ball momentum in the coordinates of p, as torch.optim.SGD has it."""
    if epc.momentum is None:
        return g
    return epc.momentum.mul_(epc.settings.point_momentum).add_(g)


def _mobius(epc: EPC, g: Tensor, lr: float | Tensor, adaptive: bool) -> None:
    direction = _accumulate(epc, g)
    if adaptive:  # as in _scale_and_rate
        direction, lr = direction * lr, 1.0
    _add(epc, direction, lr)


def _spectral(epc: EPC, g: Tensor, lr: float | Tensor) -> None:
    assert epc.momentum is not None
    epc.momentum.mul_(_SPECTRAL_MOMENTUM).add_(g)
    ahead = g.add_(epc.momentum, alpha=_SPECTRAL_MOMENTUM)
    coordinates = tuple(d for d in range(g.ndim) if d not in epc.unit_dims)
    direction = _unflatten(orthogonal_factor(_flatten(ahead, coordinates)), g.shape, coordinates)
    if epc.scale is not None:
        direction = direction * epc.scale
    _add(epc, direction * lr, 1.0)


def _add(epc: EPC, direction: Tensor, lr: float | Tensor) -> None:
    """p ← p ⊕ ((−η) ⊗ direction); on the sphere along the geodesic."""
    p, dims = epc.point, epc.dims
    pp, pg, gg = inner(p, p, dims), inner(p, direction, dims), inner(direction, direction, dims)
    eta = torch.as_tensor(lr, dtype=pp.dtype, device=pp.device)
    a, b = epc.settings.geometry.point_step(pp, pg, gg, eta, epc.radius)
    known = gg.isfinite()  # ‖direction‖² may overflow where no coordinate does: such a point holds still
    a, b = torch.where(known, a, 1.0), torch.where(known, b, 0.0)
    p.mul_(a.to(p.dtype)).addcmul_(b.to(p.dtype), direction)
    if epc.momentum is not None and epc.settings.space == "sphere":
        # the step was taken along the tangential part; keep what is tangential at the new point
        radial = epc.radius * inner(p, epc.momentum, dims)
        epc.momentum.addcmul_(radial.to(p.dtype), p, value=-1)


def _flatten(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A matrix with ``dims`` along its rows, as geoopt's manifolds want their last dimension."""
    kept = [d for d in range(tensor.ndim) if d not in dims]
    return tensor.permute(*kept, *dims).reshape(math.prod(tensor.shape[d] for d in kept), -1)


def _unflatten(rows: Tensor, shape: torch.Size, dims: tuple[int, ...]) -> Tensor:
    """The tensor of ``shape`` that `_flatten` made ``rows`` of."""
    order = [*(d for d in range(len(shape)) if d not in dims), *dims]
    return rows.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


class _OnManifold:
    """p, g and m as geoopt sees them: the point is √r p, on the manifold of radius 1; tangents keep p's units."""

    def __init__(self, epc: EPC, g: Tensor) -> None:
        self.epc = epc
        root = epc.radius**0.5
        self.root = root.reshape(-1, 1).to(g) if isinstance(root, Tensor) else root
        self.manifold = _MANIFOLDS[epc.settings.space]().to(g)
        self.point = self.root * _flatten(epc.point, epc.dims)
        self.gradient = self.manifold.egrad2rgrad(self.point, _flatten(g, epc.dims))
        self.momentum = None if epc.momentum is None else _flatten(epc.momentum, epc.dims)

    def follow(self, direction: Tensor, lr: float | Tensor) -> None:
        """Follow the geodesic along −η·direction and carry the momentum along."""
        step = -lr * self.root * direction
        if self.momentum is None:
            point = self.manifold.retr(self.point, step)
        else:
            point, momentum = self.manifold.retr_transp(self.point, step, self.momentum)
            assert self.epc.momentum is not None
            self.epc.momentum.copy_(_unflatten(momentum, self.epc.point.shape, self.epc.dims))
        if self.epc.settings.space == "ball":
            norm = point.norm(dim=-1, keepdim=True)
            point = point * ((1 - MARGIN) / norm.clamp(min=1e-30)).clamp(max=1.0)
        self.epc.point.copy_(_unflatten(point / self.root, self.epc.point.shape, self.epc.dims))


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
    beta1, beta2 = _ADAM_BETAS
    on.momentum = beta1 * on.momentum + (1 - beta1) * on.gradient
    square = on.manifold.component_inner(on.point, on.gradient)
    epc.mean_square.lerp_(square[:, :1].reshape(epc.mean_square.shape), 1 - beta2)
    steps = epc.steps.to(g.dtype)
    denominator = epc.mean_square.reshape(-1, 1).div(1 - beta2**steps).sqrt().add(_ADAM_EPS)
    on.follow(on.momentum / (1 - beta1**steps) / denominator, lr)
