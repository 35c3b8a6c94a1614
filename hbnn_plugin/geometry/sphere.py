r"""The sphere S_r = {x : r‖x‖² = 1}, the ball's boundary, as formulas on inner products (compare
``geometry/ball.py``).

Here SBNN works. A latent v is any Euclidean vector; its part v⊥ = v − r⟨p,v⟩p in the tangent space at p is what counts.
The exponential map wraps once √r‖v⊥‖ > π and is no diffeomorphism there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scalars import PointGradient, Radius, Slopes

__all__ = ["exp_slopes", "log", "needs_exact_products", "point_gradient", "point_step"]

_SERIES_BELOW = 1e-3  # of y = t², as in the ball


def _sin_ratio(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos t, s = sin(t)/t and s' = ds/dy = (cos t − s)/(2y) for t = √y, smooth through y = 0 (autograd included)."""
    small = y < _SERIES_BELOW
    y_small = torch.where(small, y, 0.0)
    y_large = torch.where(small, 1.0, y)
    t = y_large.sqrt()
    cos, sinc = t.cos(), t.sin() / t
    series_cos = 1 + y_small * (-1 / 2 + y_small * (1 / 24 + y_small * (-1 / 720 + y_small / 40320)))
    series_s = 1 + y_small * (-1 / 6 + y_small * (1 / 120 + y_small * (-1 / 5040 + y_small / 362880)))
    series_slope = -1 / 6 + y_small * (1 / 60 + y_small * (-1 / 1680 + y_small / 90720))
    return (
        torch.where(small, series_cos, cos),
        torch.where(small, series_s, sinc),
        torch.where(small, series_slope, (cos - sinc) / (2 * y_large)),
    )


def exp_slopes(pp: Tensor, vv: Tensor, pv: Tensor, r: Radius) -> Slopes:
    r"""exp_p(v) = cos(t) p + sin(t) v⊥/t = α p + β v, t = √r‖v⊥‖, for p on the sphere, and the slopes of α and β.

    α = cos t − srQ, β = s = sin(t)/t. P = 1/r is constant: no derivative by P.
    """
    y = (r * vv - (r * pv) ** 2).clamp(min=0.0)
    cos, s, slope = _sin_ratio(y)
    zero = torch.zeros_like(y)
    rq = r * pv
    return Slopes(
        alpha=cos - s * rq,
        beta=s,
        alpha_p=zero,
        alpha_v=-r * (s / 2 + rq * slope),
        alpha_q=r * (s * (rq - 1) + 2 * rq * rq * slope),
        beta_p=zero,
        beta_v=r * slope,
        beta_q=-2 * r * rq * slope,
    )


def log(pp: Tensor, xx: Tensor, px: Tensor, dd: Tensor, ss: Tensor, r: Radius) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coefficients (a, b, c) of log_p(x) = (t/sin t)(x − cos(t) p) = a p + b (x − p) + c (x + p).

    t is the angle between p and x, ‖x‖ = ‖p‖. ``dd`` = ‖x − p‖² and ``ss`` = ‖x + p‖² are measured on the vectors, so
    that nothing cancels where x is close to p or to its antipode. At the antipode itself, where every direction leads,
    the result is finite.
    """
    small, opposite = dd < 2.5e-9 * ss, ss == 0
    # the root's slope at 0 is infinite, and autograd goes both ways
    far, off = torch.where(small, ss, dd).sqrt(), torch.where(opposite, dd, ss).sqrt()
    angle = torch.where(opposite, math.pi, 2 * torch.atan2(far, off))
    sine = torch.where(opposite, 0.0, r * far * off / 2).clamp(min=1e-12)
    ratio = torch.where(small, 1 + 2 / 3 * dd / off.square(), angle / sine)
    near = dd < ss
    zero = torch.zeros_like(ratio)
    return (
        torch.where(near, ratio * r * dd / 2, -ratio * r * ss / 2),
        torch.where(near, ratio, zero),
        torch.where(near, zero, ratio),
    )


def needs_exact_products(pp: Tensor, r: Radius) -> Tensor:
    """Whether a point's inner products are wanted in float64: nothing nearly cancels on the sphere."""
    return torch.zeros_like(pp, dtype=torch.bool)


def point_gradient(gram: Tensor, r: Radius) -> PointGradient:
    r"""The part of ∂L/∂p that a point on the sphere can follow, from h = ∂L/∂v.

    Neither h nor that part sees the radial component of G = ∂L/∂x (x cannot leave the sphere), so G is taken tangent to
    the sphere at x. Along the geodesic h keeps G's length, across it h = sG; hence with k = ⟨h, v⊥⟩
    G = h⊥/s + ((cos t − 1/s)/V⊥) k v⊥ − r s k p.

    Args:
        gram: (6, points), the inner products pp, vv, pv, hp, hv, hh in this order.
    """
    pp, vv, pv, hp, hv, _ = gram
    y = (r * vv - (r * pv) ** 2).clamp(min=0.0)
    cos, s, _ = _sin_ratio(y)
    k = exp_slopes(pp, vv, pv, r)
    safe_s = torch.where(s.abs() < 1e-12, torch.full_like(s, 1e-12), s)
    small = y < 1e-6
    bend = torch.where(small, -2 / 3 - y / 45, (cos - 1 / safe_s) / torch.where(small, 1.0, y))
    along = hv - r * pv * hp
    g_v = r * bend * along
    g_p = -r * hp / safe_s - r * pv * g_v - r * s * along
    upstream = torch.stack([g_p, g_v, 1 / safe_s])
    a = g_p * pp + g_v * pv + hp / safe_s
    b = g_p * pv + g_v * vv + hv / safe_s
    gradient = k.alpha * upstream
    gradient[1] += a * k.alpha_q + b * k.beta_q
    # tangential part: subtract r⟨g, p⟩ p
    gradient[0] -= r * (gradient[0] * pp + gradient[1] * pv + gradient[2] * hp)
    return PointGradient(gradient, upstream, relative_slope=s.abs())


def point_step(pp: Tensor, pg: Tensor, gg: Tensor, step: Tensor, r: Radius) -> tuple[Tensor, Tensor]:
    r"""Coefficients (a, b) of exp_p(−η g) = a p + b g for tangent g ([HBNN] Eq. 9 on the sphere, where p ⊕ y = p).

    A step is at most half a turn, and the result is put back on the sphere exactly.
    """
    tangent = (gg - r * pg**2).clamp(min=0.0)
    bound = (math.pi / (step.abs() * (r * tangent).sqrt()).clamp(min=1e-300)).clamp(max=1.0)
    eta = -step * bound
    cos, s, _ = _sin_ratio(eta**2 * r * tangent)
    b = eta * s
    a = cos - b * r * pg
    new = (a * a * pp + 2 * a * b * pg + b * b * gg).clamp(min=1e-300)
    shrink = (r * new).rsqrt()
    return a * shrink, b * shrink
