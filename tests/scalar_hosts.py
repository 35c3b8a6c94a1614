"""IR-Net, ReCU and SiMaN once more, in scalars, from their papers: what checks the tensors shares no code with them.

A convolution whose kernel covers the image has a single pixel, y = scale · Σ b·a over a filter's binary weights b and a
sample's binary activations a. For each host two functions say what b and a are, and how a gradient with respect to them
becomes one with respect to the latent weights or the input. A row is a filter or a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Row: TypeAlias = list[float]

EPS = 1e-5


@dataclass(frozen=True)
class Binary:
    values: list[Row]
    pull: Callable[[list[Row]], list[Row]]
    """From the gradient with respect to the values to that with respect to what they are made of."""


@dataclass(frozen=True)
class ScalarHost:
    weight: Callable[[list[Row], float], Binary]
    """Of filters and progress."""
    activation: Callable[[list[Row], float, bool], Binary]
    """Of samples, progress and whether the host trains."""
    learns_scale: bool


def s(x: float) -> float:
    return 1.0 if x >= 0 else -1.0


def mean(row: Row) -> float:
    return math.fsum(row) / len(row)


def transposed(a: list[Row]) -> list[Row]:
    return [list(column) for column in zip(*a)]


def product(a: list[Row], b: list[Row]) -> list[Row]:
    return [[math.fsum(x * y for x, y in zip(row, column)) for column in transposed(b)] for row in a]


# -- standardization, z = (v - mean(v)) / √(var(v) + ε) --------


def inverse_deviation(row: Row, eps: float, free: int) -> float:
    """1 / √(var + ε), the variance a sum over ``free`` degrees of freedom."""
    middle = mean(row)
    return 1 / math.sqrt(math.fsum((v - middle) ** 2 for v in row) / free + eps)


def standardized(row: Row, eps: float, free: int) -> Row:
    middle, inverse = mean(row), inverse_deviation(row, eps, free)
    return [(v - middle) * inverse for v in row]


def through_standardization(g: Row, row: Row, eps: float, free: int) -> Row:
    """The exact gradient: ∂z_i/∂v_j = (δ_ij - 1/n - z_i z_j / free) / √(var + ε)."""
    z, inverse = standardized(row, eps, free), inverse_deviation(row, eps, free)
    along = math.fsum(gi * zi for gi, zi in zip(g, z)) / free
    return [inverse * (gj - mean(g) - zj * along) for gj, zj in zip(g, z)]


def quadratic_slope(x: float) -> float:
    """Bi-Real Net's estimator of the sign's slope, which ReCU and SiMaN share: the derivative of 2x ∓ x²."""
    return 2 - abs(2 * x) if abs(x) < 1 else 0.0


# -- IR-Net: Libra parameter binarization and the error decay estimator --------


def libra_exponent(row: Row) -> float:
    """log2(mean|ŵ|), before it is rounded."""
    return math.log2(mean([abs(z) for z in standardized(row, 0, len(row) - 1)]))


def decay_slope(x: float, progress: float) -> float:
    """The derivative of k·tanh(t·x), t from 10⁻³ to 10, by four powers of ten."""
    t = 10 ** (4 * progress - 3)
    return max(1 / t, 1) * t / math.cosh(t * x) ** 2


def irnet_weight(w: list[Row], progress: float) -> Binary:
    standard = [standardized(row, 0, len(row) - 1) for row in w]
    scales = [2.0 ** round(libra_exponent(row)) for row in w]

    def pull(grads: list[Row]) -> list[Row]:
        through_sign = [
            [gi * scale * decay_slope(z, progress) for gi, z in zip(g, zs)]
            for g, zs, scale in zip(grads, standard, scales)
        ]
        return [through_standardization(g, row, 0, len(row) - 1) for g, row in zip(through_sign, w)]

    return Binary([[s(z) * scale for z in zs] for zs, scale in zip(standard, scales)], pull)


def irnet_activation(x: list[Row], progress: float, training: bool) -> Binary:
    def pull(grads: list[Row]) -> list[Row]:
        return [[gi * decay_slope(xi, progress) for gi, xi in zip(g, row)] for g, row in zip(grads, x)]

    return Binary([[s(xi) for xi in row] for row in x], pull)


# -- ReCU: weights beyond a quantile of their Laplacian are drawn back to it --------


def recu_weight(w: list[Row], progress: float) -> Binary:
    widen = 2 * math.sqrt(2)
    standard = [[widen * z for z in standardized(row, EPS, len(row) - 1)] for row in w]
    tau = 0.85 + (0.99 - 0.85) * (math.exp(progress) - 1) / (math.e - 1)
    # A Laplacian of scale b is below -b·ln(2 - 2τ) with probability τ, and b is the mean of its magnitudes.
    quantile = -mean([abs(z) for zs in standard for z in zs]) * math.log(2 - 2 * tau)

    def pull(grads: list[Row]) -> list[Row]:
        kept = [[widen * gi if abs(z) <= quantile else 0.0 for gi, z in zip(g, zs)] for g, zs in zip(grads, standard)]
        return [through_standardization(g, row, EPS, len(row) - 1) for g, row in zip(kept, w)]

    return Binary([[s(z) for z in zs] for zs in standard], pull)


def recu_activation(x: list[Row], progress: float, training: bool) -> Binary:
    """In training of a = x / √(var(x) + ε), hence ∂a_i/∂x_j = (δ_ij - a_i z_j / free) / √(var + ε)."""

    def pull(grads: list[Row]) -> list[Row]:
        if not training:
            return [[gi * quadratic_slope(xi) for gi, xi in zip(g, row)] for g, row in zip(grads, x)]
        pulled = []
        for g, row in zip(grads, x):
            free = len(row) - 1
            inverse, z = inverse_deviation(row, EPS, free), standardized(row, EPS, free)
            a = [xi * inverse for xi in row]
            through_sign = [gi * quadratic_slope(ai) for gi, ai in zip(g, a)]
            along = math.fsum(gi * ai for gi, ai in zip(through_sign, a)) / free
            pulled.append([inverse * (gj - zj * along) for gj, zj in zip(through_sign, z)])
        return pulled

    return Binary([[s(xi) for xi in row] for row in x], pull)


# -- SiMaN: the larger half of a filter's magnitudes becomes 1, the others -1 --------


def siman_weight(w: list[Row], progress: float) -> Binary:
    centred = [[v - mean(row) for v in row] for row in w]
    magnitudes = sorted(abs(v) for row in centred for v in row)
    cut = round((15 - 15 * progress) / 100 * (len(magnitudes) - 1))
    low, high = magnitudes[cut], magnitudes[-1 - cut]
    clipped = [[s(v) * min(max(abs(v), low), high) for v in row] for row in centred]
    standard = [standardized(row, EPS, len(row) - 1) for row in clipped]
    medians = [sorted(abs(z) for z in zs)[(len(zs) - 1) // 2] for zs in standard]  # of an even number the lower one

    def pull(grads: list[Row]) -> list[Row]:
        through_abs = [[gi * s(z) if z else 0.0 for gi, z in zip(g, zs)] for g, zs in zip(grads, standard)]
        return [through_standardization(g, row, EPS, len(row) - 1) for g, row in zip(through_abs, clipped)]

    return Binary([[1.0 if abs(z) > median else -1.0 for z in zs] for zs, median in zip(standard, medians)], pull)


def siman_activation(x: list[Row], progress: float, training: bool) -> Binary:
    """Standardized as GroupNorm does it: by the biased variance."""
    standard = [standardized(row, EPS, len(row)) for row in x]

    def pull(grads: list[Row]) -> list[Row]:
        through_sign = [[gi * quadratic_slope(z) for gi, z in zip(g, zs)] for g, zs in zip(grads, standard)]
        return [through_standardization(g, row, EPS, len(row)) for g, row in zip(through_sign, x)]

    return Binary([[s(z) for z in zs] for zs in standard], pull)


SCALAR_HOSTS = {
    "irnet": ScalarHost(irnet_weight, irnet_activation, learns_scale=False),
    "recu": ScalarHost(recu_weight, recu_activation, learns_scale=True),
    "siman": ScalarHost(siman_weight, siman_activation, learns_scale=True),
}
