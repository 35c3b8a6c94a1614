r"""The exponential parametrization cluster (EPC, [HBNN] Eq. 6) on weight tensors: x = exp_p(v), and its inverse.

:mod:`hbnn_plugin.ball` and :mod:`hbnn_plugin.sphere` reduce the map to x = αp + βv with one α and one β a point. What
is left are passes over the weights (:mod:`hbnn_plugin.passes`), and this file is about making few of them:

* forward: three inner products, one combination.
* backward, with a = ⟨G,p⟩ and b = ⟨G,v⟩ for G = ∂L/∂x:
  ∂L/∂v = βG + 2(a α_V + b β_V) v + (a α_Q + b β_Q) p, and likewise ∂L/∂p.

The scalars are float64 (they are one a point), the passes run in float32 or better, the result has the weight's dtype.
In eager mode this is one autograd function; under ``torch.compile`` and ``torch.export`` it is the same formula in
plain torch ops, which those tools fuse themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ball
from .passes import Dims, combine, inner, working_dtype
from .scalars import Radius, Slopes, Space

__all__ = [
    "Map",
    "Prepared",
    "exp_map",
    "exp_map_prepared",
    "log_map",
    "mobius_add",
    "mobius_scale",
    "prepare",
    "pull_back",
]


class Map(NamedTuple):
    """One tensor's map. ``point`` and ``latent`` are of one shape and one dtype, float32 or better."""

    point: Tensor
    latent: Tensor
    radius: Radius
    space: Space
    dims: Dims


class Prepared(NamedTuple):
    """What a map needs beside its vectors."""

    scalars: Tensor
    """(9, ...), size 1 in the map's dims: the eight of :class:`Slopes`, and the taming of v."""
    careful: bool
    """Whether v has to be tamed."""
    out: Tensor
    """Memory for the result."""


def _gram(p: Tensor, v: Tensor, dims: Dims, *, exact: bool = False, scratch: Tensor | None = None) -> Tensor:
    """⟨p,p⟩, ⟨v,v⟩ and ⟨p,v⟩, stacked."""
    return torch.stack([inner(x, y, dims, exact=exact, scratch=scratch) for x, y in ((p, p), (v, v), (p, v))])


def _taming(v: Tensor, dims: Dims) -> Tensor:
    """A factor t ≤ 1 a point, less than 1 only where ‖v‖² would overflow v's dtype.

    Such a v lies so deep in the map's saturation that EPC(v) and EPC(t·v) are equal to the last digit.
    """
    limit = 1e15 if v.dtype == torch.float32 else 1e100
    return (limit / v.detach().abs().amax(dims, keepdim=True)).clamp(max=1.0)


@torch.no_grad()
def prepare(maps: Sequence[Map], out: Sequence[Tensor] | None = None) -> list[Prepared]:
    """The scalars of several maps, worked out together as far as they share space and device.

    ``out``: memory for their results, of the latents' shapes and dtypes; by default fresh.
    """
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for i, m in enumerate(maps):
        alike.setdefault((id(m.space), m.latent.device), []).append(i)
    made: dict[int, Prepared] = {}
    for members in alike.values():
        memory = [torch.empty_like(maps[i].latent) if out is None else out[i] for i in members]
        made |= zip(members, _prepare_alike([maps[i] for i in members], memory))
    return [made[i] for i in range(len(maps))]


def _prepare_alike(maps: Sequence[Map], out: Sequence[Tensor]) -> list[Prepared]:
    careful = [True] * len(maps)
    grams, tamings = [torch.empty(0)] * len(maps), [torch.empty(0)] * len(maps)
    if out[0].is_cpu:  # a CPU looks whether care is needed; elsewhere looking would cost a synchronisation
        grams = [_gram(m.point, m.latent, m.dims, scratch=memory) for m, memory in zip(maps, out)]
        tamings = [torch.ones_like(g[0]) for g in grams]
        together = _joined(grams)
        easy = (together.abs() < 1e200).all(0) & ~maps[0].space.delicate(together[0], _radii(maps, grams))
        careful = [not bool(part.all()) for part in easy.split([t.numel() for t in tamings])]
    for i, m in enumerate(maps):
        if careful[i]:
            taming = _taming(m.latent, m.dims)
            grams[i] = _gram(m.point, m.latent * taming, m.dims, exact=True)
            tamings[i] = taming.to(grams[i])
    pp, vv, pv = _joined(grams)
    slopes = maps[0].space.exp_slopes(pp, vv, pv, _radii(maps, grams))
    scalars = torch.stack([*slopes, torch.cat([t.flatten() for t in tamings])])
    parts = scalars.split([t.numel() for t in tamings], dim=1)
    whole = [part.reshape(-1, *t.shape) for part, t in zip(parts, tamings)]
    return [Prepared(*entry) for entry in zip(whole, careful, out)]


def _joined(grams: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grams], dim=1)


def _radii(maps: Sequence[Map], grams: Sequence[Tensor]) -> Tensor:
    wide = [torch.as_tensor(m.radius, dtype=g.dtype, device=g.device) for m, g in zip(maps, grams)]
    return torch.cat([radius.expand(g.shape[1:]).flatten() for radius, g in zip(wide, grams)])


@torch.no_grad()
def pull_back(of: Map, prepared: Prepared, upstream: Tensor) -> Tensor:
    """∂L/∂v for ∂L/∂x, of a map that :func:`prepare` was called for; in its memory."""
    *slopes, taming = prepared.scalars.unbind()
    v = of.latent * taming.to(of.latent.dtype) if prepared.careful else of.latent
    a, b = (inner(upstream, x, of.dims, scratch=prepared.out) for x in (of.point, v))
    return _latent_gradient(Slopes(*slopes), taming, (a, b), (upstream, v, of.point), prepared.out)


def _latent_gradient(
    k: Slopes, taming: Tensor, ab: tuple[Tensor, Tensor], vectors: tuple[Tensor, ...], out: Tensor | None
) -> Tensor:
    """βG + 2(a α_V + b β_V) v + (a α_Q + b β_Q) p, for the vectors G, v and p."""
    a, b = ab
    own, cross = 2 * (a * k.alpha_v + b * k.beta_v), a * k.alpha_q + b * k.beta_q
    return combine((taming * k.beta, taming * own, taming * cross), vectors, out=out)


def _point_gradient(k: Slopes, ab: tuple[Tensor, Tensor], vectors: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
    """αG + 2(a α_P + b β_P) p + (a α_Q + b β_Q) v, for the vectors G, p and v."""
    a, b = ab
    own, cross = 2 * (a * k.alpha_p + b * k.beta_p), a * k.alpha_q + b * k.beta_q
    return combine((k.alpha, own, cross), vectors, out=out)


class _Exp(torch.autograd.Function):
    """x = αp + βv with the closed-form backward; differentiable twice, and over vmap."""

    @staticmethod
    def forward(
        p: Tensor, v: Tensor, prepared: Prepared | None, r: Radius, space: Space, dims: Dims
    ) -> tuple[Tensor, Tensor, bool]:
        scalars, careful, out = prepared or prepare([Map(p, v, r, space, dims)])[0]
        if careful:
            v = v * scalars[8].to(v.dtype)
        return combine(scalars[:2].unbind(), (p, v), out=out), scalars, careful

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, bool]) -> None:
        p, v, _, ctx.r, ctx.space, ctx.dims = inputs
        ctx.careful = output[2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(p, v, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        p, v, scalars = ctx.saved_tensors
        dims, (*slopes, taming) = ctx.dims, scalars.unbind()
        if ctx.careful:
            v = v * taming.to(v.dtype)
        k = Slopes(*slopes)
        spare = None
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see how the scalars arise
            pp, vv, pv = _gram(p, v, dims, exact=True)
            k = ctx.space.exp_slopes(pp, vv, pv, ctx.r)
        elif not torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched cannot write into memory
            spare = torch.empty_like(v)  # becomes a gradient in the end
        ab = inner(grad, p, dims, scratch=spare), inner(grad, v, dims, scratch=spare)
        grad_p = grad_v = None
        if ctx.needs_input_grad[1]:
            grad_v, spare = _latent_gradient(k, taming, ab, (grad, v, p), spare), None
        if ctx.needs_input_grad[0]:
            grad_p = _point_gradient(k, ab, (grad, p, v), spare)
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
        return _Exp.apply(p, v, None, r, space, shifted), (0, 1, None)  # type: ignore[no-untyped-call]


def _exp_plain(p: Tensor, v: Tensor, r: Radius, space: Space, dims: Dims) -> Tensor:
    """The same map in plain torch ops, for tools that trace."""
    v = v * _taming(v, dims)
    pp, vv, pv = _gram(p, v, dims, exact=True)  # exact costs nothing where the compiler fuses it
    alpha, beta = space.exp(pp, vv, pv, r)
    return combine((alpha, beta), (p, v))


def exp_map(p: Tensor, v: Tensor, radius: Radius, space: Space = ball, dims: Dims = (-1,)) -> Tensor:
    r"""EPC_p(v) = exp_p(v), the weight of latent v seen from point p ([HBNN] Eq. 6).

    Args:
        p: points, floating, inside the ball (or on the sphere); broadcast against v.
        v: latent weights, floating.
        radius: r > 0, a number, or a tensor with one value a point (size 1 in ``dims``).
        space: :mod:`hbnn_plugin.ball` or :mod:`hbnn_plugin.sphere`.
        dims: the dimensions of one point; the others count points.

    Returns:
        Tensor of the broadcast shape and v's dtype, computed in float32 or better whatever autocast says.
    """
    dtype = working_dtype(v.dtype)
    p_work, v_work = torch.broadcast_tensors(p.to(dtype), v.to(dtype))
    if torch.compiler.is_compiling():
        return _exp_plain(p_work, v_work, radius, space, dims).to(v.dtype)
    x: Tensor = _Exp.apply(p_work, v_work, None, radius, space, dims)[0]  # type: ignore[no-untyped-call]
    return x.to(v.dtype)


def exp_map_prepared(of: Map, prepared: Prepared) -> Tensor:
    """:func:`exp_map` of a map that :func:`prepare` was called for, and whose vectors are the same still."""
    x: Tensor = _Exp.apply(of.point, of.latent, prepared, of.radius, of.space, of.dims)[0]  # type: ignore[no-untyped-call]
    return x


def log_map(p: Tensor, x: Tensor, radius: Radius, space: Space = ball, dims: Dims = (-1,)) -> Tensor:
    r"""The latent v with exp_p(v) = x, the inverse of :func:`exp_map`; shapes and dtypes as there.

    x must lie in the ball (on the sphere).
    """
    dtype = working_dtype(x.dtype)
    p_work, x_work = p.to(dtype), x.to(dtype)
    difference, total = x_work - p_work, x_work + p_work
    pairs = ((p_work, p_work), (x_work, x_work), (p_work, x_work), (difference, difference), (total, total))
    pp, xx, px, dd, ss = (inner(one, other, dims, exact=True) for one, other in pairs)
    coefficients = space.log(pp, xx, px, dd, ss, radius)
    return combine(coefficients, (p_work, difference, total)).to(x.dtype)


def mobius_add(x: Tensor, y: Tensor, radius: Radius, dims: Dims = (-1,)) -> Tensor:
    r"""x ⊕ y in the ball, [Ganea] Eq. 2; x and y broadcast against each other outside ``dims``."""
    dtype = working_dtype(x.dtype)
    x_work, y_work = x.to(dtype), y.to(dtype)
    xx, yy, xy = (inner(a, b, dims) for a, b in ((x_work, x_work), (y_work, y_work), (x_work, y_work)))
    return combine(ball.mobius_add(xx, yy, xy, radius), (x_work, y_work)).to(x.dtype)


def mobius_scale(t: float | Tensor, x: Tensor, radius: Radius, dims: Dims = (-1,)) -> Tensor:
    r"""t ⊗ x in the ball, [Ganea] Eq. 3, for √r‖x‖ < 1; t is a number or one value a point (size 1 in ``dims``)."""
    x_work = x.to(working_dtype(x.dtype))
    xx = inner(x_work, x_work, dims)
    factor = ball.mobius_scale(torch.as_tensor(t, dtype=xx.dtype, device=xx.device), xx, radius)
    return combine((factor,), (x_work,)).to(x.dtype)
