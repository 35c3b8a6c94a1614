r"""The exponential parametrization cluster (EPC, [HBNN] Eq. 6) on weight tensors: x = exp_p(v), and its inverse.

``geometry/ball.py`` and ``geometry/sphere.py`` reduce the map to x = αp + βv with one α and one β a point. What
is left are passes over the weights (``geometry/passes.py``), and this file is about making few of them:

* forward: three inner products, one combination.
* backward, with a = ⟨G,p⟩ and b = ⟨G,v⟩ for G = ∂L/∂x:
  ∂L/∂v = βG + 2(a α_V + b β_V) v + (a α_Q + b β_Q) p and ∂L/∂p = αG + 2(a α_P + b β_P) p + (a α_Q + b β_Q) v.

The scalars are float64 (they are one a point), the passes run in float32 or better, the result has the weight's dtype.
In eager mode this is one autograd function; under ``torch.compile`` and ``torch.export`` it is the same formula in
plain torch ops, which those tools fuse themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ball
from .dtypes import scalar_dtype, working_dtype
from .joint_passes import combine_each, inner_products, places_of_equals
from .looking import may_look, traced
from .passes import Dims, combine, inner, largest
from .scalars import Radius, Slopes, Space, scalar, side_by_side

__all__ = [
    "Map",
    "Mapped",
    "exp_map",
    "exp_map_mapped",
    "exp_maps",
    "log_map",
    "mobius_add",
    "mobius_scale",
    "pull_back",
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
    """(9, ...), size 1 in the map's dims: :func:`_table`, and v's taming."""
    careful: bool
    """Whether v has to be tamed."""


_GRAM = ((0, 0), (1, 1), (0, 1))
"""⟨p,p⟩, ⟨v,v⟩ and ⟨p,v⟩ of (p, v)."""


def _gram(p: Tensor, v: Tensor, dims: Dims) -> list[Tensor]:
    """The same three, summed in float64, for tools that watch how they arise."""
    vectors = [x.to(scalar_dtype(x.device)) for x in (p, v)]
    return [inner(vectors[i], vectors[j], dims) for i, j in _GRAM]


def _taming(size: Tensor) -> Tensor:
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
        scalars, careful, latents = _scalars(together, memory)
        alpha, beta = scalars[_RESULT]
        shapes = [m.scalar_shape for m in together]
        vectors = [(v, m.point) for v, m in zip(latents, together)]
        combine_each(torch.stack([beta, alpha]), vectors, shapes, memory)
        parts = scalars.split([math.prod(shape) for shape in shapes], dim=1)
        entries = zip(memory, (part.reshape(len(part), *shape) for part, shape in zip(parts, shapes)), careful)
        made.update(zip(members, (Mapped(*entry) for entry in entries)))
    return [made[i] for i in range(len(maps))]


@torch.no_grad()
def pull_back(maps: Sequence[Map], upstreams: Sequence[Tensor]) -> list[Tensor]:
    """∂L/∂v of each map for ∂L/∂x, all maps together; nothing for autograd."""
    pulled = [torch.empty_like(m.latent) for m in maps]
    for members in _alike(maps):
        together, memory = [maps[i] for i in members], [pulled[i] for i in members]
        scalars, careful, latents = _scalars(together, memory)
        vectors = [(v, upstreams[i], m.point) for v, i, m in zip(latents, members, together)]
        scratch = [None if care else free for care, free in zip(careful, memory)]
        b, a = inner_products(vectors, ((1, 0), (1, 2)), [m.dims for m in together], scratch=scratch)
        _, own, cross = _slopes(scalars, a, b)
        coefficients = scalars[_TAMING] * torch.stack([own, scalars[1], cross])
        combine_each(coefficients, vectors, [m.scalar_shape for m in together], memory)
    return pulled


def _alike(maps: Sequence[Map]) -> list[list[int]]:
    """The maps that share space, device and dtype."""
    return places_of_equals((id(m.space), m.latent.device, m.latent.dtype) for m in maps)


def _scalars(maps: Sequence[Map], memory: Sequence[Tensor]) -> tuple[Tensor, list[bool], list[Tensor]]:
    """What the maps need beside their vectors, of the points side by side: (9, points), :func:`_table` and v's taming.

    Also whose v has to be tamed, and all v, tamed in ``memory`` where they have to be.
    """
    space, shapes, dims = maps[0].space, [m.scalar_shape for m in maps], [m.dims for m in maps]
    sizes = [math.prod(shape) for shape in shapes]
    latents, device = [m.latent for m in maps], maps[0].latent.device
    gram = torch.empty(3, sum(sizes), dtype=scalar_dtype(device), device=device)
    radii = side_by_side([m.radius for m in maps], shapes, gram)
    taming = torch.ones_like(gram[0])
    hard = list(range(len(maps)))
    if may_look(gram):  # for whom care is needed
        gram = inner_products([(m.point, m.latent) for m in maps], _GRAM, dims, scratch=memory)
        easy = (gram.abs() < 1e200).all(0) & ~space.delicate(gram[0], radii)
        hard = [] if bool(easy.all()) else [i for i, part in enumerate(easy.split(sizes)) if not bool(part.all())]
    if hard:
        counts = [sizes[i] for i in hard]
        tame = _taming(torch.cat([largest(latents[i], dims[i]).flatten() for i in hard]))
        for i, t in zip(hard, tame.split(counts)):
            latents[i] = torch.mul(latents[i], t.reshape(shapes[i]), out=memory[i])
        exact = inner_products([(maps[i].point, latents[i]) for i in hard], _GRAM, [dims[i] for i in hard], exact=True)
        grams, tamings = list(gram.split(sizes, dim=1)), list(taming.split(sizes))
        for i, part, t in zip(hard, exact.split(counts, dim=1), tame.to(taming.dtype).split(counts)):
            grams[i], tamings[i] = part, t
        gram, taming = torch.cat(grams, dim=1), torch.cat(tamings)
    pp, vv, pv = gram
    scalars = torch.cat([_table(space.exp_slopes(pp, vv, pv, radii)), taming[None]])
    return scalars, [i in hard for i in range(len(maps))], latents


_RESULT, _BY_A, _BY_B, _TAMING = slice(0, 2), slice(2, 5), slice(5, 8), 8
"""Places among the scalars."""


def _table(k: Slopes) -> Tensor:
    """α and β; then what a = ⟨G,p⟩, and what b = ⟨G,v⟩, adds to three coefficients: see :func:`_slopes`."""
    return torch.stack([k.alpha, k.beta, 2 * k.alpha_p, 2 * k.alpha_v, k.alpha_q, 2 * k.beta_p, 2 * k.beta_v, k.beta_q])


def _slopes(table: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The coefficients of p in ∂L/∂p, of v in ∂L/∂v, and of the other vector in both."""
    return torch.addcmul(a * table[_BY_A], b, table[_BY_B])


class _Exp(torch.autograd.Function):
    """x = αp + βv with the closed-form backward; differentiable twice, and over vmap."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch's, which first binds the arguments through inspect: longer than the map of a small layer takes."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(p: Tensor, v: Tensor, mapped: Mapped | None, r: Radius, space: Space, dims: Dims) -> Mapped:
        if mapped is None:
            return exp_maps([Map(p, v, r, space, dims)])[0]
        if mapped.weight is None:
            tame = v * mapped.scalars[_TAMING].to(v.dtype) if mapped.careful else v
            alpha, beta = mapped.scalars[_RESULT]
            return mapped._replace(weight=combine((beta, alpha), (tame, p)))
        return mapped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Mapped) -> None:
        p, v, _, ctx.r, ctx.space, ctx.dims = inputs
        _, scalars, ctx.careful = output
        ctx.mark_non_differentiable(scalars)
        ctx.set_materialize_grads(False)  # no zeros for them
        ctx.save_for_backward(p, v, scalars)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        p, v, scalars = ctx.saved_tensors
        dims, table, taming = ctx.dims, scalars, scalars[_TAMING]
        if ctx.careful:
            v = v * taming.to(v.dtype)
        spare = None
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see how the scalars arise
            table = _table(ctx.space.exp_slopes(*_gram(p, v, dims), ctx.r))
        elif not torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched cannot write into memory
            spare = torch.empty_like(v)  # becomes a gradient in the end
        a, b = inner(grad, p, dims, scratch=spare), inner(grad, v, dims, scratch=spare)
        own_p, own_v, cross = _slopes(table, a, b)
        grad_p = grad_v = None
        if ctx.needs_input_grad[1]:
            coefficients = torch.stack([table[1], own_v, cross])
            if ctx.careful:
                coefficients = coefficients * taming
            grad_v, spare = combine(coefficients.to(v.dtype).unbind(), (grad, v, p), out=spare), None
        if ctx.needs_input_grad[0]:
            grad_p = combine((table[0], own_p, cross), (grad, p, v), out=spare)
        return grad_p, grad_v, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], p: Tensor, v: Tensor, _: None, r: Radius, space: Space, dims: Dims
    ) -> Any:
        # One more batch dimension in front is to the formula what more points are.
        p, v = (
            x.movedim(d, 0) if d is not None else x.unsqueeze(0).expand(info.batch_size, *x.shape)
            for x, d in zip((p, v), in_dims)
        )
        if isinstance(r, Tensor) and in_dims[3] is not None:
            r = r.movedim(in_dims[3], 0)
            r = r.reshape(r.shape[:1] + (1,) * (v.ndim - r.ndim) + r.shape[1:])
        shifted = tuple(d + 1 if d >= 0 else d for d in dims)
        return _Exp.apply(p, v, None, r, space, shifted), (0, 1, None)


def _exp_plain(p: Tensor, v: Tensor, r: Radius, space: Space, dims: Dims) -> Tensor:
    """The same map in plain torch ops, for tools that trace, and for a gradient to the radius."""
    v = v * _taming(largest(v.detach(), dims))
    pp, vv, pv = _gram(p, v, dims)  # float64 costs nothing where the compiler fuses it
    alpha, beta, *_ = space.exp_slopes(pp, vv, pv, r)
    return combine((alpha, beta), (p, v))


def _may_learn(radius: Tensor) -> bool:
    # inside vmap a tensor does not tell what is outside
    return radius.requires_grad or torch._C._functorch.is_batchedtensor(radius)


def exp_map(p: Tensor, v: Tensor, radius: Radius, space: Space = ball, dims: Dims = (-1,)) -> Tensor:
    r"""EPC_p(v) = exp_p(v), the weight of latent v seen from point p ([HBNN] Eq. 6).

    Args:
        p: points, floating, inside the ball (or on the sphere); broadcast against v.
        v: latent weights, floating.
        radius: r > 0, a number, or a tensor with one value a point (size 1 in ``dims``).
        space: ``hbnn_plugin.ball`` or ``hbnn_plugin.sphere``.
        dims: the dimensions of one point; the others count points.

    Returns:
        Tensor of the broadcast shape and v's dtype, computed in float32 or better whatever autocast says.
    """
    dtype = working_dtype(v.dtype)
    p_work, v_work = torch.broadcast_tensors(p.to(dtype), v.to(dtype))
    if traced() or (isinstance(radius, Tensor) and _may_learn(radius)):
        return _exp_plain(p_work, v_work, radius, space, dims).to(v.dtype)
    x: Tensor = _Exp.apply(p_work, v_work, None, radius, space, dims)[0]
    return x.to(v.dtype)


def exp_map_mapped(of: Map, mapped: Mapped) -> Tensor:
    """:func:`exp_map` of a map that :func:`exp_maps` has worked out, and whose vectors are the same still."""
    x: Tensor = _Exp.apply(of.point, of.latent, mapped, of.radius, of.space, of.dims)[0]
    return x


def log_map(p: Tensor, x: Tensor, radius: Radius, space: Space = ball, dims: Dims = (-1,)) -> Tensor:
    r"""The latent v with exp_p(v) = x, the inverse of :func:`exp_map`.

    Args:
        p: points, as there; broadcast against x.
        x: weights, floating, inside the ball (or on the sphere).
        radius, space, dims: as there.

    Returns:
        Tensor of the broadcast shape and x's dtype.
    """
    dtype = working_dtype(x.dtype)
    p_work, x_work = torch.broadcast_tensors(p.to(dtype), x.to(dtype))
    difference, total = x_work - p_work, x_work + p_work
    p_wide, x_wide, *others = (t.to(scalar_dtype(x.device)) for t in (p_work, x_work, difference, total))
    pp, xx, dd, ss = (inner(t, t, dims) for t in (p_wide, x_wide, *others))
    px = inner(p_wide, x_wide, dims)
    coefficients = space.log(pp, xx, px, dd, ss, radius)
    return combine(coefficients, (p_work, difference, total)).to(x.dtype)


def mobius_add(x: Tensor, y: Tensor, radius: Radius, dims: Dims = (-1,)) -> Tensor:
    r"""x ⊕ y in the ball, [Ganea] Eq. 2.

    Args:
        x, y: floating, inside the ball; they broadcast against each other outside ``dims``.
        radius: r > 0, a number, or a tensor with one value a point (size 1 in ``dims``).
        dims: the dimensions of one point, of the same size in both.

    Returns:
        Tensor of the broadcast shape and x's dtype.
    """
    dtype = working_dtype(x.dtype)
    x_work, y_work = x.to(dtype), y.to(dtype)
    xx, yy, xy = (inner(a, b, dims) for a, b in ((x_work, x_work), (y_work, y_work), (x_work, y_work)))
    return combine(ball.mobius_add(xx, yy, xy, radius), (x_work, y_work)).to(x.dtype)


def mobius_scale(t: float | Tensor, x: Tensor, radius: Radius, dims: Dims = (-1,)) -> Tensor:
    r"""t ⊗ x in the ball, [Ganea] Eq. 3.

    Args:
        t: a number, or one value a point (size 1 in ``dims``).
        x: floating, inside the ball: √r‖x‖ < 1.
        radius, dims: as in :func:`mobius_add`.

    Returns:
        Tensor of x's shape and dtype.
    """
    x_work = x.to(working_dtype(x.dtype))
    xx = inner(x_work, x_work, dims)
    factor = ball.mobius_scale(scalar(t, xx), xx, radius)
    return combine((factor,), (x_work,)).to(x.dtype)
