r"""How a point moves, given its gradient g = ∂L/∂p and its learning rate η.

* ``mobius``: p ← p ⊕ ((−η) ⊗ g), [HBNN] Eq. 9; on the sphere, where that step moves nothing, p ← exp_p(−η g_tangent).
* ``riemannian``: geoopt's RiemannianSGD (without dampening or Nesterov): g is turned into the Riemannian gradient, the
  point follows its geodesic, momentum is transported along.
* ``riemannian-adam``: geoopt's RiemannianAdam with betas (0.9, 0.999) and eps 1e-8.
* ``spectral`` (not in the paper): p ← p ⊕ (−ηO), O the orthogonal factor of the layer's g with Nesterov momentum,
  as a matrix (output units × coordinates): each filter's point moves by about η, and no direction that the layer's
  filters share outruns the others (``geometry/spectral.py``; more than 64 filters in blocks). With ``relative=True``
  by about ηs.
* ``fixed``: not at all.

How large η is, ``optimizer/moves.py`` tells, and what changes under an optimizer of Adam's kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cluster.epc import EPC
from ..geometry import ball
from ..geometry.joint_passes import combine_each, inner_products, places_of_equals
from ..geometry.passes import inner
from ..geometry.scalars import side_by_side
from ..geometry.spectral import orthogonal_factors
from .matrices import as_matrix, as_vector
from .moves import Move, is_adaptive, root_mean_square
from .recovery import radii_of
from .riemannian import follow_geodesic

__all__ = ["move"]


class _Direction(NamedTuple):
    """p ← p ⊕ ((−η) ⊗ f·d)."""

    vector: Tensor
    """d, of p's shape."""
    factor: float | Tensor
    """f, a number or one a point."""
    eta: float | Tensor


@torch.no_grad()
def move(steps: Sequence[Move]) -> None:
    """Make the steps, in place."""
    for step in steps:
        step.epc.revision += 1
    for members in places_of_equals(_kind(step) for step in steps):
        together = [steps[i] for i in members]
        rule = together[0].epc.settings.rule
        if all(step.found.all_valid for step in together):
            torch._foreach_add_([step.epc.steps for step in together], 1)
        else:
            torch._foreach_add_([step.epc.steps for step in together], [step.found.valid.any() for step in together])
        if rule.startswith("riemannian"):
            for step in together:
                follow_geodesic(step)
        elif rule == "spectral":
            _add(together, _spectral_directions(together))
        else:
            _add(together, _mobius_directions(together))


def _kind(step: Move) -> tuple[object, ...]:
    """What steps that are made together share."""
    chosen, point = step.epc.settings, step.epc.point
    return chosen.rule, chosen.space, chosen.point_momentum, point.device, point.dtype


def _add(steps: Sequence[Move], directions: Sequence[_Direction]) -> None:
    """p ← (kept ⊗ p) ⊕ ((−η) ⊗ f·d), on the sphere along the geodesic; the scalars of all clusters together."""
    clusters = [step.epc for step in steps]
    shapes = [epc.scalar_shape for epc in clusters]
    pp, pd, dd = _products(steps, directions)

    def each_point(values: Iterable[float | Tensor]) -> Tensor:
        return side_by_side([*values], shapes, pp) * torch.ones_like(pp)

    f, eta = each_point(d.factor for d in directions), each_point(d.eta for d in directions)
    radii = radii_of(clusters, pp)
    shrink = torch.ones_like(pp)
    if any(epc.settings.point_decay for epc in clusters):
        shrink = ball.mobius_scale(each_point(step.kept for step in steps), pp, radii)
    geometry = clusters[0].settings.geometry
    a, b = geometry.point_step(shrink * shrink * pp, shrink * f * pd, f * f * dd, eta, radii)
    # ‖d‖² may overflow where no coordinate does: such a point holds still
    moves = torch.cat([step.found.valid.flatten() for step in steps]) & dd.isfinite()
    coefficients = torch.stack([torch.where(moves, a * shrink, 1.0), torch.where(moves, b * f, 0.0)])
    points = [epc.point for epc in clusters]
    combine_each(coefficients, [(p, d.vector) for p, d in zip(points, directions)], shapes, out=points)
    for epc in clusters:
        if epc.momentum is not None and epc.settings.space == "sphere":
            _make_tangent(epc)


def _products(steps: Sequence[Move], directions: Sequence[_Direction]) -> Tensor:
    """⟨p,p⟩, ⟨p,d⟩ and ⟨d,d⟩; known where d is the gradient itself."""
    known = torch.cat([step.found.products for step in steps], dim=1)
    chosen = steps[0].epc.settings  # the rule and the momentum are those of all
    if chosen.rule == "mobius" and not chosen.point_momentum:
        return known
    vectors = [(step.epc.point, d.vector) for step, d in zip(steps, directions)]
    return torch.cat([known[:1], inner_products(vectors, ((0, 1), (1, 1)), [step.epc.dims for step in steps])])


def _make_tangent(epc: EPC) -> None:
    """The step was taken along the momentum's tangential part; keep of it what is tangential at the new point."""
    assert epc.momentum is not None
    radial = epc.radius * inner(epc.point, epc.momentum, epc.dims)
    epc.momentum.addcmul_(radial.to(epc.momentum.dtype), epc.point, value=-1)


def _mobius_directions(steps: Sequence[Move]) -> list[_Direction]:
    if steps[0].epc.settings.point_momentum:
        for step in steps:
            if is_adaptive(step.group):
                step.found.gradient.div_(root_mean_square(step))
        momenta = _accumulate(steps)
        # a vector of norm √n would lie outside ⊗'s domain: scale first, p ⊕ ((−1) ⊗ ηd), the same to first order
        return [
            _Direction(m, step.lr, 1.0) if is_adaptive(step.group) else _Direction(m, 1.0, step.lr)
            for step, m in zip(steps, momenta)
        ]
    return [
        _Direction(step.found.gradient, step.lr / root_mean_square(step), 1.0)
        if is_adaptive(step.group)
        else _Direction(step.found.gradient, 1.0, step.lr)
        for step in steps
    ]


def _spectral_directions(steps: Sequence[Move]) -> list[_Direction]:
    """The orthogonal factors of the gradients, or, with momentum, of Nesterov's look ahead."""
    gradients = [step.found.gradient for step in steps]
    mu = steps[0].epc.settings.point_momentum
    if mu:
        torch._foreach_add_(gradients, _accumulate(steps), alpha=mu)
    directions = []
    factors = orthogonal_factors([as_matrix(g, step.epc) for g, step in zip(gradients, steps)])
    for step, g, factor in zip(steps, gradients, factors):
        scale = step.epc.scale
        d = as_vector(factor, g, step.epc)
        directions.append(_Direction(d, step.lr if scale is None else step.lr * scale, 1.0))
    return directions


def _accumulate(steps: Sequence[Move]) -> list[Tensor]:
    """The heavy balls, in the coordinates of p, having taken in the gradients where they are known."""
    momenta = [m for step in steps if (m := step.epc.momentum) is not None]  # all have one: they share the setting
    gradients, mu = [step.found.gradient for step in steps], steps[0].epc.settings.point_momentum
    if all(step.found.all_valid for step in steps):
        for m, g in zip(momenta, gradients):
            torch.add(g, m, alpha=mu, out=m)
        return momenta
    valid = torch.cat([step.found.valid.flatten() for step in steps])
    kept = torch.ones_like(valid, dtype=gradients[0].dtype).masked_fill_(valid, mu)  # an unknown gradient reads 0
    shapes = [step.found.valid.shape for step in steps]
    for m, g, part, shape in zip(momenta, gradients, kept.split([step.epc.point_count for step in steps]), shapes):
        torch.addcmul(g, m, part.reshape(shape), out=m)
    return momenta
