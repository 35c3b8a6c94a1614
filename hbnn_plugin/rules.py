r"""How a point moves, given its gradient g = ∂L/∂p and its learning rate η.

* ``mobius``: p ← p ⊕ ((−η) ⊗ g), [HBNN] Eq. 9; on the sphere, where that step moves nothing, p ← exp_p(−η g_tangent).
* ``riemannian``: geoopt's RiemannianSGD (without dampening or Nesterov): g is turned into the Riemannian gradient, the
  point follows its geodesic, momentum is transported along.
* ``riemannian-adam``: geoopt's RiemannianAdam with betas (0.9, 0.999) and eps 1e-8.
* ``spectral`` (not in the paper): p ← p ⊕ (−ηO), O the orthogonal factor of the layer's g with Nesterov momentum,
  as a matrix (output units × coordinates): each filter's point moves by about η, and no direction that the layer's
  filters share outruns the others (:mod:`hbnn_plugin.spectral`; more than 64 filters in blocks). With ``relative=True``
  by about ηs.
* ``fixed``: not at all.

η is point_lr · lr ** point_lr_power, lr the weight's learning rate. The power is 1, for spectral points ¾: their steps
shrink with η alone, a weight's with its gradient too. At ½ they are still restless at the end of training on a host
whose gradients do not vanish (ReCU), at 1 they gain less (README, "Beyond the paper").

Under an optimizer of Adam's kind (its group has ``betas``, or ``eps`` and one of :data:`_SQUARES`) the weights move by
about lr a coordinate however large their gradient is. For the first two rules g is then divided by the running root
mean square of its coordinates, one number a point, with the group's own β₂ (or ``alpha``, ``rho``; else .999) and eps,
so that the point's coordinates move by about η too; ``mobius`` is then p ← p ⊕ (−ηg), since a g of norm √n lies outside
the domain of ⊗. Spectral points take steps of a fixed length as the weights do: η is then point_lr · lr · √n, whatever
point_lr_power says, with √n such that their coordinates move by about point_lr · lr.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor

from . import ball
from .cluster import EPC
from .epc import mobius_scale
from .joint_passes import combine_each, inner_products
from .passes import inner, lie_alike, rows_of
from .recovery import Recovered, radii_of
from .scalars import side_by_side
from .spectral import longer_side, orthogonal_factors

__all__ = ["Move", "check_point_lr", "move", "point_rate"]

# Of radius 1, the home of √r p. The exact ball: its retraction is the exponential map; PoincareBall's is not.
_MANIFOLDS = {"ball": geoopt.PoincareBallExact, "sphere": geoopt.SphereExact}
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8
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


class _Direction(NamedTuple):
    """p ← p ⊕ ((−η) ⊗ f·d)."""

    vector: Tensor
    """d, of p's shape."""
    factor: float | Tensor
    """f, a number or one a point."""
    eta: float | Tensor


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
    if epc.settings.rule == "spectral" and _adaptive(group):
        coordinates = math.prod(epc.point.shape[d] for d in _coordinates(epc))
        return lr * factor * math.sqrt(longer_side(epc.point.numel() // coordinates, coordinates))
    # a schedule that ends at zero may end a rounding below
    power = epc.settings.point_lr_power
    return factor * (lr.sign() * lr.abs() ** power if isinstance(lr, Tensor) else math.copysign(abs(lr) ** power, lr))


def _adaptive(group: Mapping[str, Any]) -> bool:
    """Whether its optimizer is of Adam's kind."""
    return "betas" in group or ("eps" in group and not group.keys().isdisjoint(_SQUARES))


@torch.no_grad()
def move(steps: Sequence[Move]) -> None:
    """Make the steps, in place."""
    for step in steps:
        step.epc.moves += 1
    for (rule, *_), group in groupby(sorted(steps, key=_kind), key=_kind):
        together = list(group)
        if all(step.found.all_valid for step in together):
            torch._foreach_add_([step.epc.steps for step in together], 1)
        else:
            torch._foreach_add_([step.epc.steps for step in together], [step.found.valid.any() for step in together])
        if rule.startswith("riemannian"):
            for step in together:
                _follow(step)
        elif rule == "spectral":
            _add(together, _spectral_directions(together))
        else:
            _add(together, _mobius_directions(together))


def _kind(step: Move) -> tuple[str, str, float, str, str]:
    chosen, point = step.epc.settings, step.epc.point
    return chosen.rule, chosen.space, chosen.point_momentum, str(point.device), str(point.dtype)


def _add(steps: Sequence[Move], directions: Sequence[_Direction]) -> None:
    """p ← (kept ⊗ p) ⊕ ((−η) ⊗ f·d), on the sphere along the geodesic; the scalars of all clusters together."""
    clusters = [step.epc for step in steps]
    shapes = [epc.mean_square.shape for epc in clusters]
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
            if _adaptive(step.group):
                step.found.gradient.div_(_root_mean_square(step))
        momenta = _accumulate(steps)
        # a vector of norm √n would lie outside ⊗'s domain: scale first, p ⊕ ((−1) ⊗ ηd), the same to first order
        return [
            _Direction(m, step.lr, 1.0) if _adaptive(step.group) else _Direction(m, 1.0, step.lr)
            for step, m in zip(steps, momenta)
        ]
    return [
        _Direction(step.found.gradient, step.lr / _root_mean_square(step), 1.0)
        if _adaptive(step.group)
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
    factors = orthogonal_factors([_as_matrix(g, step.epc) for g, step in zip(gradients, steps)])
    for step, g, factor in zip(steps, gradients, factors):
        scale = step.epc.scale
        d = _as_vector(factor, g, step.epc)
        directions.append(_Direction(d, step.lr if scale is None else step.lr * scale, 1.0))
    return directions


def _as_matrix(g: Tensor, epc: EPC) -> Tensor:
    """g as a matrix, a row an output unit; a row's coordinates are in the order in which they lie in memory."""
    return rows_of(g) if _lies_in_units(g, epc) else _flatten(g, _coordinates(epc))


def _as_vector(matrix: Tensor, g: Tensor, epc: EPC) -> Tensor:
    """What :func:`_as_matrix` makes ``matrix`` of, lying in memory as ``g``."""
    if _lies_in_units(g, epc):
        return matrix.contiguous().as_strided(g.shape, g.stride())
    return torch.empty_like(g).copy_(_unflatten(matrix, g.shape, _coordinates(epc)))


def _lies_in_units(g: Tensor, epc: EPC) -> bool:
    return epc.unit_dims == (0,) and lie_alike([g])


def _coordinates(epc: EPC) -> tuple[int, ...]:
    """The dimensions of one filter, whatever a point covers."""
    return tuple(d for d in range(epc.point.ndim) if d not in epc.unit_dims)


def _accumulate(steps: Sequence[Move]) -> list[Tensor]:
    """The heavy balls, in the coordinates of p, having taken in the gradients where they are known."""
    momenta = []
    for step in steps:
        g, m, mu = step.found.gradient, step.epc.momentum, step.epc.settings.point_momentum
        assert m is not None
        if step.found.all_valid:
            torch.add(g, m, alpha=mu, out=m)
        else:  # an unknown gradient reads 0
            torch.addcmul(g, m, m.new_ones(()).masked_fill(step.found.valid, mu), out=m)
        momenta.append(m)
    return momenta


def _root_mean_square(step: Move) -> Tensor:
    """√m̂ + eps, one number a point, m the running mean square of g's coordinates with the group's β₂."""
    epc, group, valid = step.epc, step.group, step.found.valid
    beta = float(group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho", _ADAM_BETAS[1])))
    eps = group.get("eps", _ADAM_EPS)
    gg = step.found.products[2].reshape(epc.mean_square.shape)
    now = (gg * (epc.points / epc.point.numel())).to(epc.mean_square.dtype)
    epc.mean_square.copy_(torch.where(valid, epc.mean_square.lerp(now, 1 - beta), epc.mean_square))
    corrected = epc.mean_square / (1 - beta ** epc.steps.to(epc.mean_square.dtype))
    root = corrected.sqrt() + (float(eps) if isinstance(eps, (int, float)) else _ADAM_EPS)
    return torch.where(valid, root, 1.0)  # before the first valid gradient it is 0/0


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
            point = point * ((1 - ball.MARGIN) / norm.clamp(min=1e-30)).clamp(max=1.0)
        self.epc.point.copy_(_unflatten(point / self.root, self.epc.point.shape, self.epc.dims))


def _follow(step: Move) -> None:
    """A step by geoopt's manifolds."""
    epc, g = step.epc, step.found.gradient
    state = [t for t in (epc.point, epc.momentum, epc.mean_square) if t is not None]
    before = None if step.found.all_valid else [t.clone() for t in state]
    if epc.settings.point_decay:
        epc.point.copy_(mobius_scale(step.kept, epc.point, epc.radius, epc.dims))
    if epc.settings.rule == "riemannian-adam":
        _riemannian_adam(epc, g, step.lr)
    else:
        _riemannian(epc, g.div_(_root_mean_square(step)) if _adaptive(step.group) else g, step.lr)
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
    beta1, beta2 = _ADAM_BETAS
    on.momentum = beta1 * on.momentum + (1 - beta1) * on.gradient
    square = on.manifold.component_inner(on.point, on.gradient)
    epc.mean_square.lerp_(square[:, :1].reshape(epc.mean_square.shape), 1 - beta2)
    steps = epc.steps.to(g.dtype)
    denominator = epc.mean_square.reshape(-1, 1).div(1 - beta2**steps).sqrt().add(_ADAM_EPS)
    on.follow(on.momentum / (1 - beta1**steps) / denominator, lr)
