r"""The maps of several layers together, outside autograd; with what their backward needs.

``geometry/ball.py`` and ``geometry/sphere.py`` reduce a map to x = αp + βv with one α and one β a point. Their scalars
are float64 and worked out for all points side by side; what is left are passes over the weights
(``geometry/joint_passes.py``), in float32 or better.

A v so long that ‖v‖² would overflow is prescaled, and inner products are summed in float64 where float32 would lose
too much: if values may be looked at, only in the layers that need it, and else in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import scalar_dtype
from .joint_passes import combine_each, inner_products, places_of_equals
from .looking import may_look
from .passes import Dims, largest
from .scalars import Radius, Slopes, Space, side_by_side

__all__ = [
    "GRAM",
    "PRESCALE",
    "RESULT",
    "Map",
    "Mapped",
    "corrections",
    "exp_maps",
    "prescale",
    "pull_back",
    "scalar_table",
]


class Map(NamedTuple):
    """One tensor's map. ``point`` and ``latent`` are of one shape and one dtype, float32 or better."""

    point: Tensor
    latent: Tensor
    radius: Radius
    space: Space
    dims: Dims

    @property
    def scalar_shape(self) -> tuple[int, ...]:
        """Of what is one number a point: size 1 in ``dims``."""
        covered = {d % self.latent.ndim for d in self.dims}
        return tuple(1 if d in covered else n for d, n in enumerate(self.latent.shape))


class Mapped(NamedTuple):
    """A map's result and what its backward needs beside the vectors."""

    weight: Tensor | None
    """x, in memory of its own; None once somebody has it: the next gets another."""
    scalars: Tensor
    """(9, ...), size 1 in the map's dims: :func:`scalar_table`, and v's prescale."""
    prescaled: bool
    """Whether v has to be multiplied by its prescale."""


GRAM = ((0, 0), (1, 1), (0, 1))
"""⟨p,p⟩, ⟨v,v⟩ and ⟨p,v⟩ of (p, v)."""


def prescale(size: Tensor) -> Tensor:
    """A factor t ≤ 1 for a v whose largest coordinate has this size: less than 1 only where ‖v‖² overflows its dtype.

    Such a v lies so deep in the map's saturation that EPC(v) and EPC(t·v) are equal to the last digit.
    """
    limit = 1e15 if size.dtype == torch.float32 else 1e100
    return (limit / size).clamp(max=1.0)


@torch.no_grad()
def exp_maps(maps: Sequence[Map], out: Sequence[Tensor] | None = None) -> list[Mapped]:
    """:func:`exp_map` of all maps together, in fresh memory or into ``out``, of the latents' shapes and dtypes.

    For autograd to know of them, see :func:`exp_map_mapped`.
    """
    out = [torch.empty_like(m.latent) for m in maps] if out is None else out
    made: dict[int, Mapped] = {}
    for members in _alike(maps):
        together, memory = [maps[i] for i in members], [out[i] for i in members]
        scalars, prescaled, latents = _scalars(together, memory)
        alpha, beta = scalars[RESULT]
        shapes = [m.scalar_shape for m in together]
        vectors = [(v, m.point) for v, m in zip(latents, together)]
        combine_each(torch.stack([beta, alpha]), vectors, shapes, memory)
        parts = scalars.split([math.prod(shape) for shape in shapes], dim=1)
        entries = zip(memory, (part.reshape(len(part), *shape) for part, shape in zip(parts, shapes)), prescaled)
        made.update(zip(members, (Mapped(*entry) for entry in entries)))
    return [made[i] for i in range(len(maps))]


@torch.no_grad()
def pull_back(maps: Sequence[Map], upstreams: Sequence[Tensor]) -> list[Tensor]:
    """∂L/∂v of each map for ∂L/∂x, all maps together; nothing for autograd."""
    pulled = [torch.empty_like(m.latent) for m in maps]
    for members in _alike(maps):
        together, memory = [maps[i] for i in members], [pulled[i] for i in members]
        scalars, prescaled, latents = _scalars(together, memory)
        vectors = [(v, upstreams[i], m.point) for v, i, m in zip(latents, members, together)]
        scratch = [None if in_use else free for in_use, free in zip(prescaled, memory)]
        b, a = inner_products(vectors, ((1, 0), (1, 2)), [m.dims for m in together], scratch=scratch)
        _, own, cross = corrections(scalars, a, b)
        coefficients = scalars[PRESCALE] * torch.stack([own, scalars[1], cross])
        combine_each(coefficients, vectors, [m.scalar_shape for m in together], memory)
    return pulled


def _alike(maps: Sequence[Map]) -> list[list[int]]:
    """The maps that share space, device and dtype."""
    return places_of_equals((id(m.space), m.latent.device, m.latent.dtype) for m in maps)


def _scalars(maps: Sequence[Map], memory: Sequence[Tensor]) -> tuple[Tensor, list[bool], list[Tensor]]:
    """What the maps need beside their vectors, of the points side by side: (9, points), as :class:`Mapped` has them.

    Also whose v has been prescaled, which then lie in ``memory``, and all v.
    """
    space, shapes, dims = maps[0].space, [m.scalar_shape for m in maps], [m.dims for m in maps]
    sizes = [math.prod(shape) for shape in shapes]
    latents, device = [m.latent for m in maps], maps[0].latent.device
    gram = torch.empty(3, sum(sizes), dtype=scalar_dtype(device), device=device)
    radii = side_by_side([m.radius for m in maps], shapes, gram)
    scales = torch.ones_like(gram[0])
    redone = list(range(len(maps)))  # with exact inner products
    if may_look(gram):
        gram = inner_products([(m.point, m.latent) for m in maps], GRAM, dims, scratch=memory)
        good = (gram.abs() < 1e200).all(0) & ~space.needs_exact_products(gram[0], radii)
        redone = [] if bool(good.all()) else [i for i, part in enumerate(good.split(sizes)) if not bool(part.all())]
    if redone:
        counts = [sizes[i] for i in redone]
        own_scales = prescale(torch.cat([largest(latents[i], dims[i]).flatten() for i in redone]))
        for i, t in zip(redone, own_scales.split(counts)):
            latents[i] = torch.mul(latents[i], t.reshape(shapes[i]), out=memory[i])
        pairs = [(maps[i].point, latents[i]) for i in redone]
        exact = inner_products(pairs, GRAM, [dims[i] for i in redone], exact=True)
        grams, parts = list(gram.split(sizes, dim=1)), list(scales.split(sizes))
        for i, products, t in zip(redone, exact.split(counts, dim=1), own_scales.to(scales.dtype).split(counts)):
            grams[i], parts[i] = products, t
        gram, scales = torch.cat(grams, dim=1), torch.cat(parts)
    pp, vv, pv = gram
    scalars = torch.cat([scalar_table(space.exp_slopes(pp, vv, pv, radii)), scales[None]])
    return scalars, [i in redone for i in range(len(maps))], latents


RESULT, _BY_A, _BY_B, PRESCALE = slice(0, 2), slice(2, 5), slice(5, 8), 8
"""Places among the scalars."""


def scalar_table(k: Slopes) -> Tensor:
    """α and β; then what a = ⟨G,p⟩, and what b = ⟨G,v⟩, adds to three coefficients: see :func:`corrections`."""
    return torch.stack([k.alpha, k.beta, 2 * k.alpha_p, 2 * k.alpha_v, k.alpha_q, 2 * k.beta_p, 2 * k.beta_v, k.beta_q])


def corrections(table: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The rank-2 part of the backward: of p in ∂L/∂p, of v in ∂L/∂v, and of the other vector in both."""
    return torch.addcmul(a * table[_BY_A], b, table[_BY_B])
