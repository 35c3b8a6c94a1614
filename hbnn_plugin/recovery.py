r"""The point's gradient, from the latent's.

``v.grad`` is h = J_v(p, v)ᵀ G for G = ∂L/∂x. J_v is an invertible rank-2 change of a multiple of the identity, so G,
and with it ∂L/∂p = J_pᵀ G, is a combination of p, v and h whose three coefficients follow from six inner products. A
point therefore needs no gradient of its own, and whatever has been done to ``v.grad`` (all-reduce, unscaling, clipping,
accumulation), being linear, has been done to the point's gradient too. A term that was added to ``v.grad`` without
passing through the weight, such as the gradient of a penalty on the latent, is read as if it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .cluster import EPC
from .passes import combine, inner
from .sharding import whole

__all__ = ["Recovered", "radii_of", "recover"]

_ROUNDINGS = 10.0
"""A point holds still where the map squeezes its weight's gradient to fewer than this many roundings of its dtype."""


class Recovered(NamedTuple):
    """Gradients at one cluster; ``valid`` is False for points that have to hold still (their gradients read 0)."""

    gradient: Tensor
    """g = ∂L/∂p (on the sphere its tangential part), of p's shape and dtype."""
    products: Tensor
    """(3, ...), one number a point: ⟨p,p⟩, ⟨p,g⟩ and ⟨g,g⟩, which cost nothing here."""
    upstream: Tensor | None
    """G = ∂L/∂x, if asked for."""
    valid: Tensor
    """One bool a point."""


def _gram(epc: EPC, v: Tensor, h: Tensor, scratch: Tensor) -> Tensor:
    p = epc.point
    pairs = ((p, p), (v, v), (p, v), (h, p), (h, v), (h, h))
    return torch.stack([inner(x, y, epc.dims, scratch=scratch).flatten() for x, y in pairs])


def _products(gram: Tensor, coefficients: Tensor) -> Tensor:
    """⟨p,p⟩, ⟨p,g⟩ and ⟨g,g⟩ of g = c₀ p + c₁ v + c₂ h."""
    pp, vv, pv, hp, hv, hh = gram
    c0, c1, c2 = coefficients
    pg = c0 * pp + c1 * pv + c2 * hp
    gg = c0 * pg + c1 * (c0 * pv + c1 * vv + c2 * hv) + c2 * (c0 * hp + c1 * hv + c2 * hh)
    return torch.stack([pp, pg, gg.clamp(min=0.0)])


def radii_of(epc: EPC, like: Tensor) -> Tensor:
    """The radius of each point, (points,), of ``like``'s dtype and device."""
    r = epc.radius
    return r.flatten().to(like) if isinstance(r, Tensor) else like.new_full((epc.points,), r)


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
    order = sorted(range(len(clusters)), key=lambda i: (clusters[i].settings.space, str(clusters[i].point.device)))
    for _, indices in groupby(order, key=lambda i: (clusters[i].settings.space, clusters[i].point.device)):
        members = list(indices)
        vectors = []
        for i in members:
            epc = clusters[i]
            v, h = (epc.logical(whole(t.detach())).to(epc.point.dtype) for t in (epc.parameter, gradients[i]))
            vectors.append((epc.point, v, h))
        spare = [torch.empty_like(p) for p, _, _ in vectors]  # become the gradients in the end
        gram = torch.cat([_gram(clusters[i], v, h, out) for i, (_, v, h), out in zip(members, vectors, spare)], dim=1)
        radii = torch.cat([radii_of(clusters[i], gram) for i in members])
        found = clusters[members[0]].settings.geometry.point_gradient(gram, radii)
        sizes = [clusters[i].points for i in members]
        eps = torch.cat([gram.new_full((n,), torch.finfo(gradients[i].dtype).eps) for i, n in zip(members, sizes)])
        valid = found.gradient.isfinite().all(0) & found.upstream.isfinite().all(0) & gram[5].isfinite()
        valid &= found.squeeze > _ROUNDINGS * eps
        unscale = gram.new_ones(())
        if grad_scale is not None:
            unscale = unscale / grad_scale.to(gram)
        if found_inf is not None:
            valid = valid & (found_inf.to(gram.device) == 0)
        to_gradient = torch.where(valid, found.gradient, 0.0) * unscale
        to_upstream = torch.where(valid, found.upstream, 0.0)  # keeps grad_scale: it goes back into v.grad
        products = torch.where(valid, _products(gram, to_gradient), 0.0)
        scalars = (t.split(sizes, dim=-1) for t in (to_gradient, to_upstream, products, valid))
        for i, (p, v, h), out, (gradient_part, upstream_part, products_part, valid_part) in zip(
            members, vectors, spare, zip(*scalars)
        ):
            shape = clusters[i].mean_square.shape
            mask = valid_part.reshape(shape)
            if not (h.is_cpu and bool(valid_part.all())):  # 0 · nan is nan
                v, h = torch.where(mask, v, 0.0), torch.where(mask, h, 0.0)  # noqa: PLW2901
            results[i] = Recovered(
                combine(gradient_part.reshape(3, *shape).unbind(), (p, v, h), out=out),
                products_part.reshape(3, *shape),
                combine(upstream_part.reshape(3, *shape).unbind(), (p, v, h)) if upstream else None,
                mask,
            )
    return [results[i] for i in range(len(clusters))]
