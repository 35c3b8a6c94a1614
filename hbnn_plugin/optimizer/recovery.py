r"""The point's gradient, from the latent's.

``v.grad`` is h = J_v(p, v)ᵀ G for G = ∂L/∂x. J_v is an invertible rank-2 change of a multiple of the identity, so G,
and with it ∂L/∂p = J_pᵀ G, is a combination of p, v and h whose three coefficients follow from six inner products. A
point therefore needs no gradient of its own, and whatever has been done to ``v.grad`` (all-reduce, unscaling, clipping,
accumulation), being linear, has been done to the point's gradient too. A term that was added to ``v.grad`` without
passing through the weight, such as the gradient of a penalty on the latent, is read as if it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cluster.epc import EPC
from ..geometry.joint_passes import combine_each, inner_products, places_of_equals
from ..geometry.looking import may_look
from ..geometry.scalars import Radius, side_by_side
from ..host.sharding import whole

__all__ = ["Recovered", "radii_of", "recover"]

_ROUNDINGS = 10.0
"""A point holds still where the map squeezes its weight's gradient to fewer than this many roundings of its dtype."""


class Recovered(NamedTuple):
    """Gradients at one cluster; ``valid`` is False for points that have to hold still (their gradients read 0)."""

    gradient: Tensor
    """g = ∂L/∂p (on the sphere its tangential part), of p's shape and dtype."""
    products: Tensor
    """(3, points): ⟨p,p⟩, ⟨p,g⟩ and ⟨g,g⟩, which cost nothing here."""
    upstream: Tensor | None
    """G = ∂L/∂x, if asked for."""
    valid: Tensor
    """One bool a point."""
    all_valid: bool
    """Whether ``valid`` is known to be True everywhere."""


_GRAM = ((0, 0), (1, 1), (0, 1), (2, 0), (2, 1), (2, 2))
"""⟨p,p⟩, ⟨v,v⟩, ⟨p,v⟩, ⟨h,p⟩, ⟨h,v⟩ and ⟨h,h⟩ of (p, v, h)."""


def _products(gram: Tensor, coefficients: Tensor) -> Tensor:
    """⟨p,p⟩, ⟨p,g⟩ and ⟨g,g⟩ of g = c₀ p + c₁ v + c₂ h."""
    pp, vv, pv, hp, hv, hh = gram
    c0, c1, c2 = coefficients
    pg = c0 * pp + c1 * pv + c2 * hp
    gg = c0 * pg + c1 * (c0 * pv + c1 * vv + c2 * hv) + c2 * (c0 * hp + c1 * hv + c2 * hh)
    return torch.stack([pp, pg, gg.clamp(min=0.0)])


def radii_of(clusters: Sequence[EPC], like: Tensor) -> Radius:
    """The radii of the clusters' points side by side."""
    return side_by_side([epc.radius for epc in clusters], [epc.scalar_shape for epc in clusters], like)


@torch.no_grad()
def recover(
    clusters: Sequence[EPC],
    gradients: Sequence[Tensor],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    upstream: bool = False,
) -> list[Recovered]:
    """∂L/∂p of every cluster from the gradient of its latent; the scalars of all clusters are handled together.

    Args:
        clusters: whose points.
        gradients: h = ∂L/∂v for each, of the latent's shape.
        grad_scale: a factor that ``gradients`` still carry (torch's GradScaler with fused optimizers).
        found_inf: nonzero where the optimizer is going to skip this step (likewise).
        upstream: whether G is wanted as well.
    """
    results: dict[int, Recovered] = {}
    for members in places_of_equals(
        (epc.settings.space, epc.point.device, epc.point.dtype, gradient.dtype)
        for epc, gradient in zip(clusters, gradients)
    ):
        alike = [clusters[i] for i in members], [gradients[i] for i in members]
        results.update(zip(members, _recover_alike(*alike, grad_scale, found_inf, upstream)))
    return [results[i] for i in range(len(clusters))]


def _recover_alike(
    clusters: Sequence[EPC],
    gradients: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    upstream: bool,
) -> list[Recovered]:
    """Of one space, device and dtype."""
    vectors = []
    for epc, gradient in zip(clusters, gradients):
        v, h = (epc.logical(whole(t.detach())).to(epc.point) for t in (epc.parameter, gradient))
        vectors.append((epc.point, v, h))
    memory = [torch.empty_like(epc.point) for epc in clusters]  # becomes the gradients in the end
    gram = inner_products(vectors, _GRAM, [epc.dims for epc in clusters], scratch=memory)
    found = clusters[0].settings.geometry.point_gradient(gram, radii_of(clusters, gram))
    valid = found.gradient.isfinite().all(0) & found.upstream.isfinite().all(0) & gram[5].isfinite()
    valid &= found.relative_slope > _ROUNDINGS * torch.finfo(gradients[0].dtype).eps
    if found_inf is not None:
        valid = valid & (found_inf.to(gram.device) == 0)
    all_valid = may_look(valid) and bool(valid.all())
    shapes = [epc.scalar_shape for epc in clusters]
    sizes = [epc.point_count for epc in clusters]

    def combined(coefficients: Tensor, out: list[Tensor]) -> list[Tensor]:
        combine_each(coefficients, vectors, shapes, out)
        if not all_valid:  # 0 · nan is nan
            for tensor, hole, shape in zip(out, (~valid).split(sizes), shapes):
                tensor.masked_fill_(hole.reshape(shape), 0.0)
        return out

    to_gradient = torch.where(valid, found.gradient, 0.0)
    if grad_scale is not None:
        to_gradient = to_gradient / grad_scale.to(gram)
    found_gradients = combined(to_gradient, memory)
    upstreams: list[Any] = [None] * len(clusters)
    if upstream:  # keeps grad_scale: it goes back into v.grad
        upstreams = combined(found.upstream, [torch.empty_like(epc.point) for epc in clusters])
    products = torch.where(valid, _products(gram, to_gradient), 0.0).split(sizes, dim=1)
    masks = [mask.reshape(shape) for mask, shape in zip(valid.split(sizes), shapes)]
    return [Recovered(*entry, all_valid) for entry in zip(found_gradients, products, upstreams, masks)]
