r"""The Poincaré ball D_r = {x : r‖x‖² < 1}, as formulas on inner products.

Every map on the ball takes vectors to linear combinations of those same vectors, with coefficients that depend on their
inner products alone. So this module never sees a weight tensor: it takes inner products (one number a point, float64)
and returns coefficients; ``geometry/exponential.py`` does the few passes over the weights. ``r`` is what the HBNN paper
calls the radius (Ganea's curvature c): the edge lies at ‖x‖ = 1/√r. An argument ``xy`` stands for the inner product
⟨x, y⟩.

References:
    [HBNN] Hyperbolic Binary Neural Network, arXiv 2501.03471: Eq. 6 (EPC), Eq. 9 (the point's step).
    [Ganea] Hyperbolic neural networks, NeurIPS 2018: Möbius operations, exponential and logarithmic maps.
    [Ungar] Analytic hyperbolic geometry, 2005: left cancellation (−p) ⊕ (p ⊕ y) = y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scalars import PointGradient, Radius, Slopes

__all__ = [
    "MARGIN",
    "exp_slopes",
    "log",
    "mobius_add",
    "mobius_scale",
    "needs_exact_products",
    "point_gradient",
    "point_step",
]

MARGIN = 1e-3
"""Points, and weights that are read back, stay within (1 − MARGIN) of the edge: 1 − r‖p‖² → 0 would silence v."""

_SERIES_BELOW = 1e-3  # of y = z²; there the series below and the closed forms agree to about 1e-13


def _tanh_ratio(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T = tanh(z)/z, S = 1/cosh²(z) and W = (T − S)/z² for z = √y, smooth through y = 0 (autograd included)."""
    small = y < _SERIES_BELOW
    y_small = torch.where(small, y, 0.0)
    y_large = torch.where(small, 1.0, y)
    z = y_large.sqrt()
    tanh_ratio = z.tanh() / z
    sech_squared = z.clamp(max=350.0).cosh() ** -2  # 1/cosh² underflows to 0 long before the clamp
    series = 1 + y_small * (-1 / 3 + y_small * (2 / 15 + y_small * (-17 / 315 + y_small * (62 / 2835))))
    series_w = 2 / 3 + y_small * (-8 / 15 + y_small * (34 / 105 + y_small * (-496 / 2835 + y_small * (2764 / 31185))))
    t = torch.where(small, series, tanh_ratio)
    w = torch.where(small, series_w, (tanh_ratio - sech_squared) / y_large)
    s = torch.where(small, t - w * y_small, sech_squared)
    return t, s, w


def _cauchy_schwarz(pv: Tensor, pp: Tensor, vv: Tensor) -> Tensor:
    """⟨p, v⟩ held inside ±‖p‖‖v‖, which rounding may overstep; the gradient passes unchanged."""
    with torch.no_grad():
        bound = (pp * vv).sqrt()
        correction = torch.clamp(pv, min=-bound, max=bound) - pv
    return pv + correction


def _room(pp: Tensor, r: Radius) -> Tensor:
    """B = 1 − rP, kept positive for a point that does not lie in the ball."""
    return (1 - r * pp).clamp(min=1e-12)


def exp_slopes(pp: Tensor, vv: Tensor, pv: Tensor, r: Radius) -> Slopes:
    r"""exp_p(v) = p ⊕ tanh(√r λ_p‖v‖/2) v/(√r‖v‖) = α p + β v  ([HBNN] Eq. 6), and the slopes of α and β.

    With B = 1 − rP, z = √(rV)/B, T = tanh(z)/z and D = 1 + 2rTQ/B + rP·tanh²z:  α = 1 + B·tanh²z/D,  β = T/D.
    """
    q = _cauchy_schwarz(pv, pp, vv)
    b, rp = _room(pp, r), r * pp
    e = r / b
    c = e / b  # few operations: on one number a filter they cost as much as a pass over a small layer
    y = c * vv
    t, s, w = _tanh_ratio(y)
    theta_squared = y * t * t
    et, st = e * t, s * t
    d = 1 + 2 * et * q + rp * theta_squared
    # by V
    t_v = -0.5 * w * c
    k_v = st * c
    d_v = 2 * e * q * t_v + rp * k_v
    # by P
    t_p = e * (s - t)
    k_p = 2 * e * st * y
    d_p = 2 * r * q * c * s + r * theta_squared + rp * k_p
    # by Q
    d_q = 2 * et
    more, beta, per_d = b * theta_squared / d, t / d, 1 / d  # α − 1 and β
    return Slopes(
        alpha=1 + more,
        beta=beta,
        alpha_p=(b * k_p - r * theta_squared - more * d_p) * per_d,
        alpha_v=(b * k_v - more * d_v) * per_d,
        alpha_q=-more * d_q * per_d,
        beta_p=(t_p - beta * d_p) * per_d,
        beta_v=(t_v - beta * d_v) * per_d,
        beta_q=-beta * d_q * per_d,
    )


def needs_exact_products(pp: Tensor, r: Radius) -> Tensor:
    """Whether a point's inner products are wanted in float64: near the edge, against v, D is a difference near 0."""
    return r * pp > 0.8


def log(pp: Tensor, xx: Tensor, px: Tensor, dd: Tensor, ss: Tensor, r: Radius) -> tuple[Tensor, Tensor, Tensor]:
    r"""Coefficients (a, b, c) of log_p(x) = (2/(√r λ_p)) artanh(√r‖u‖) u/‖u‖ = a p + b (x − p) + c (x + p).

    ``dd`` = ‖x − p‖² is measured on the vectors: √r‖u‖ = √(r·dd/D), u = (−p) ⊕ x, holds its digits where x is close
    to p. c is 0.
    """
    room_p, room_x = _room(pp, r), _room(xx, r)
    d = (1 - 2 * r * px + r * r * pp * xx).clamp(min=1e-24)
    s_squared = r * dd / d
    small = s_squared < 1e-6
    s = torch.where(small, 0.25, s_squared).sqrt()  # the root's slope at 0 is infinite, and autograd goes both ways
    # artanh(s) = log((1 + s)/√(1 − s²)), where 1 − s² = (1 − rP)(1 − rX)/D keeps its digits near the edge
    artanh = torch.log1p(s) - 0.5 * torch.log(room_p * room_x / d)
    ratio = torch.where(small, 1 + s_squared / 3 + s_squared**2 / 5, artanh / s)
    # u = [(1 − rP)(x − p) − r‖x − p‖² p]/D
    return -room_p * ratio * r * dd / d, room_p * ratio * room_p / d, torch.zeros_like(d)


def mobius_add(xx: Tensor, yy: Tensor, xy: Tensor, r: Radius) -> tuple[Tensor, Tensor]:
    r"""Coefficients (a, b) of x ⊕ y = a x + b y.

    x ⊕ y = [(1 + 2r⟨x,y⟩ + r‖y‖²) x + (1 − r‖x‖²) y]/[1 + 2r⟨x,y⟩ + r²‖x‖²‖y‖²], [Ganea] Eq. 2.
    """
    d = (1 + 2 * r * xy + r * r * xx * yy).clamp(min=1e-24)
    return (1 + 2 * r * xy + r * yy) / d, (1 - r * xx) / d


def mobius_scale(t: Tensor, xx: Tensor, r: Radius) -> Tensor:
    r"""Coefficient of x in t ⊗ x = tanh(t·artanh(√r‖x‖)) x/(√r‖x‖), for √r‖x‖ < 1."""
    s_squared = r * xx
    small = s_squared < 1e-8
    s = torch.where(small, 0.5, s_squared).sqrt()
    return torch.where(small, t * (1 + s_squared * (1 - t * t) / 3), (t * s.atanh()).tanh() / s)


def point_gradient(gram: Tensor, r: Radius) -> PointGradient:
    r"""∂L/∂p from h = ∂L/∂v: h is an invertible rank-2 change of βG, G = ∂L/∂x.

    With a = ⟨G,p⟩ and b = ⟨G,v⟩, h = βG + c_v v + c_p p (c_v = 2(a α_V + b β_V), c_p = a α_Q + b β_Q). Taking the inner
    products of h with p and v gives two equations for a and b; then G and ∂L/∂p = αG + 2(a α_P + b β_P) p + c_p v
    follow.

    Args:
        gram: (6, points), the inner products pp, vv, pv, hp, hv, hh in this order.
    """
    pp, vv, pv, hp, hv, _ = gram
    k = exp_slopes(pp, vv, pv, r)
    m11 = k.beta + 2 * k.alpha_v * pv + k.alpha_q * pp
    m12 = 2 * k.beta_v * pv + k.beta_q * pp
    m21 = 2 * k.alpha_v * vv + k.alpha_q * pv
    m22 = k.beta + 2 * k.beta_v * vv + k.beta_q * pv
    det = m11 * m22 - m12 * m21
    a = (m22 * hp - m12 * hv) / det
    b = (m11 * hv - m21 * hp) / det
    c_v = 2 * (a * k.alpha_v + b * k.beta_v)
    c_p = a * k.alpha_q + b * k.beta_q
    upstream = torch.stack([-c_p / k.beta, -c_v / k.beta, 1 / k.beta])
    gradient = k.alpha * upstream
    gradient[0] += 2 * (a * k.alpha_p + b * k.beta_p)
    gradient[1] += c_p
    # The rank-2 change squeezes h by the ratio of the map's slopes along and across v: what is left of a gradient in
    # single precision cannot be stretched back once that ratio nears its rounding.
    return PointGradient(gradient, upstream, relative_slope=(det / k.beta**2).abs())


def point_step(pp: Tensor, pg: Tensor, gg: Tensor, step: Tensor, r: Radius) -> tuple[Tensor, Tensor]:
    r"""Coefficients (a, b) of p ⊕ ((−η) ⊗ g) = a p + b g  ([HBNN] Eq. 9), g bounded to the ball, the result to MARGIN.

    Args:
        step: η, the point's learning rate.
    """
    edge = (1 - MARGIN) ** 2 / r
    bound = (edge / gg.clamp(min=1e-300)).sqrt().clamp(max=1.0)  # ⊗ takes arguments inside the ball only
    scale = mobius_scale(-step, gg * bound**2, r) * bound
    a, b = mobius_add(pp, scale**2 * gg, scale * pg, r)
    b = b * scale
    new = (a * a * pp + 2 * a * b * pg + b * b * gg).clamp(min=1e-300)
    shrink = (edge / new).sqrt().clamp(max=1.0)
    return a * shrink, b * shrink
