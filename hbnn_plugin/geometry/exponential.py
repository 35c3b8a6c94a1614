r"""The exponential parametrization cluster (EPC, [HBNN] Eq. 6) on weight tensors: x = exp_p(v), and its inverse.

``geometry/ball.py`` and ``geometry/sphere.py`` reduce the map to x = αp + βv with one α and one β a point. What
is left are few passes over the weights (``geometry/passes.py``):

* forward: three inner products, one combination.
* backward, with a = ⟨G,p⟩ and b = ⟨G,v⟩ for G = ∂L/∂x:
  ∂L/∂v = βG + 2(a α_V + b β_V) v + (a α_Q + b β_Q) p and ∂L/∂p = αG + 2(a α_P + b β_P) p + (a α_Q + b β_Q) v.

The scalars are float64 (they are one a point), the passes run in float32 or better, the result has the weight's dtype.
In eager mode this is one autograd function; under ``torch.compile`` and ``torch.export`` it is the same formula in
plain torch ops, which those tools fuse themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ball
from .dtypes import scalar_dtype, working_dtype
from .joint_maps import GRAM, PRESCALE, RESULT, Map, Mapped, corrections, exp_maps, prescale, scalar_table
from .looking import traced
from .passes import Dims, combine, inner, largest
from .scalars import Radius, Space, scalar

__all__ = ["exp_map", "exp_map_mapped", "log_map", "mobius_add", "mobius_scale"]


def _gram(p: Tensor, v: Tensor, dims: Dims) -> list[Tensor]:
    """⟨p,p⟩, ⟨v,v⟩ and ⟨p,v⟩, summed in float64, for tools that watch how they arise."""
    vectors = [x.to(scalar_dtype(x.device)) for x in (p, v)]
    return [inner(vectors[i], vectors[j], dims) for i, j in GRAM]


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
            if mapped.prescaled:
                v = v * mapped.scalars[PRESCALE].to(v.dtype)
            alpha, beta = mapped.scalars[RESULT]
            return mapped._replace(weight=combine((beta, alpha), (v, p)))
        return mapped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Mapped) -> None:
        p, v, _, ctx.r, ctx.space, ctx.dims = inputs
        _, scalars, ctx.prescaled = output
        ctx.mark_non_differentiable(scalars)
        ctx.set_materialize_grads(False)  # no zeros for them
        ctx.save_for_backward(p, v, scalars)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        p, v, scalars = ctx.saved_tensors
        dims, table, scale = ctx.dims, scalars, scalars[PRESCALE]
        if ctx.prescaled:
            v = v * scale.to(v.dtype)
        spare = None
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see how the scalars arise
            table = scalar_table(ctx.space.exp_slopes(*_gram(p, v, dims), ctx.r))
        elif not torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched cannot write into memory
            spare = torch.empty_like(v)  # becomes a gradient in the end
        a, b = inner(grad, p, dims, scratch=spare), inner(grad, v, dims, scratch=spare)
        own_p, own_v, cross = corrections(table, a, b)
        grad_p = grad_v = None
        if ctx.needs_input_grad[1]:
            coefficients = torch.stack([table[1], own_v, cross])
            if ctx.prescaled:
                coefficients = coefficients * scale
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
    v = v * prescale(largest(v.detach(), dims))
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
