r"""The exponential parametrization cluster (EPC, [HBNN] Eq. 6) on weight tensors: x = exp_p(v), and its inverse.

:mod:`hbnn_plugin.ball` and :mod:`hbnn_plugin.sphere` reduce the map to x = αp + βv with one α and one β a point. What
is left are passes over the weights, and this file is about making few of them:

* forward: three inner products, one combination.
* backward, with a = ⟨G,p⟩ and b = ⟨G,v⟩ for G = ∂L/∂x:
  ∂L/∂v = βG + 2(a α_V + b β_V) v + (a α_Q + b β_Q) p, and likewise ∂L/∂p.

The scalars are float64 (they are one a point), the passes run in float32 or better, the result has the weight's dtype.
In eager mode this is one autograd function; under ``torch.compile`` and ``torch.export`` it is the same formula in
plain torch ops, which those tools fuse themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ball
from .scalars import Radius, Slopes, Space

__all__ = ["combine", "exp_map", "inner", "log_map", "mobius_add", "mobius_scale", "scalar_dtype", "working_dtype"]

Dims = tuple[int, ...]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or better: in half precision a point at the margin has no digits left for its distance to the edge."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64 for what is one number a point, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def inner(x: Tensor, y: Tensor, dims: Dims, exact: bool = False) -> Tensor:
    """⟨x, y⟩ over ``dims`` (kept with size 1) as float64, summed in the tensors' dtype or, if ``exact``, in float64."""
    wide = scalar_dtype(x.device)
    if exact:
        x, y = x.to(wide), y.to(wide)
    # Not vector_norm: on a CPU it sums sequentially and loses four digits over a layer of 2 million float32 weights.
    return (x * y).sum(dims, keepdim=True).to(wide)


def _gram(p: Tensor, v: Tensor, dims: Dims, exact: bool) -> Tensor:
    """⟨p,p⟩, ⟨v,v⟩ and ⟨p,v⟩, stacked."""
    return torch.stack([inner(x, y, dims, exact) for x, y in ((p, p), (v, v), (p, v))])


def combine(coefficients: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> Tensor:
    """Σ c_i x_i, one coefficient a point, in the vectors' dtype."""
    dtype = vectors[0].dtype
    result = coefficients[0].to(dtype) * vectors[0]
    for coefficient, vector in zip(coefficients[1:], vectors[1:]):
        if torch.is_grad_enabled():  # autograd or functorch watches: no writing over what it may have kept
            result = torch.addcmul(result, coefficient.to(dtype), vector)
        else:
            result.addcmul_(coefficient.to(dtype), vector)
    return result


def _taming(v: Tensor, dims: Dims) -> Tensor:
    """A factor t ≤ 1 a point, less than 1 only where ‖v‖² would overflow v's dtype.

    Such a v lies so deep in the map's saturation that EPC(v) and EPC(t·v) are equal to the last digit.
    """
    limit = 1e15 if v.dtype == torch.float32 else 1e100
    return (limit / v.detach().abs().amax(dims, keepdim=True)).clamp(max=1.0)


class _Exp(torch.autograd.Function):
    """x = αp + βv with the closed-form backward; differentiable twice, and over vmap."""

    @staticmethod
    def forward(p: Tensor, v: Tensor, r: Radius, space: Space, dims: Dims) -> tuple[Tensor, Tensor, bool]:
        careful = not v.is_cpu  # a CPU looks whether care is needed; elsewhere looking would cost a synchronisation
        if not careful:
            gram = _gram(p, v, dims, exact=False)
            taming = torch.ones_like(gram[0])
            careful = not bool(((gram.abs() < 1e200) & ~space.delicate(gram[0], r)).all())
        if careful:
            taming = _taming(v, dims).to(scalar_dtype(v.device))
            v = v * taming.to(v.dtype)
            gram = _gram(p, v, dims, exact=True)
        slopes = space.exp_slopes(gram[0], gram[1], gram[2], r)
        return combine((slopes.alpha, slopes.beta), (p, v)), torch.stack([*slopes, taming]), careful

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, bool]) -> None:
        p, v, ctx.r, ctx.space, ctx.dims = inputs
        ctx.careful = output[2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(p, v, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        p, v, scalars = ctx.saved_tensors
        dims, (*slopes, taming) = ctx.dims, scalars.unbind()
        if ctx.careful:
            v = v * taming.to(v.dtype)
        k = Slopes(*slopes)
        if torch.is_grad_enabled():  # a second derivative is wanted: let autograd see how the scalars arise
            gram = _gram(p, v, dims, exact=True)
            k = ctx.space.exp_slopes(gram[0], gram[1], gram[2], ctx.r)
        a, b = inner(grad, p, dims), inner(grad, v, dims)
        cross = a * k.alpha_q + b * k.beta_q
        grad_p = grad_v = None
        if ctx.needs_input_grad[0]:
            grad_p = combine((k.alpha, 2 * (a * k.alpha_p + b * k.beta_p), cross), (grad, p, v))
        if ctx.needs_input_grad[1]:
            own = 2 * (a * k.alpha_v + b * k.beta_v)
            grad_v = combine((taming * k.beta, taming * own, taming * cross), (grad, v, p))
        return grad_p, grad_v, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], p: Tensor, v: Tensor, r: Radius, space: Space, dims: Dims) -> Any:
        # One more batch dimension in front is to the formula what more points are.
        p, v = (
            x.movedim(d, 0) if d is not None else x.unsqueeze(0).expand(info.batch_size, *x.shape)
            for x, d in zip((p, v), in_dims)
        )
        if isinstance(r, Tensor) and in_dims[2] is not None:
            r = r.movedim(in_dims[2], 0)
            r = r.reshape(r.shape[:1] + (1,) * (v.ndim - r.ndim) + r.shape[1:])
        shifted = tuple(d + 1 if d >= 0 else d for d in dims)
        return _Exp.apply(p, v, r, space, shifted), (0, 1, None)  # type: ignore[no-untyped-call]


def _exp_plain(p: Tensor, v: Tensor, r: Radius, space: Space, dims: Dims) -> Tensor:
    """The same map in plain torch ops, for tools that trace."""
    v = v * _taming(v, dims)
    gram = _gram(p, v, dims, exact=True)  # costs nothing where the compiler fuses it
    alpha, beta = space.exp(gram[0], gram[1], gram[2], r)
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
    x: Tensor = _Exp.apply(p_work, v_work, radius, space, dims)[0]  # type: ignore[no-untyped-call]
    return x.to(v.dtype)


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
