"""Binary weights as bits: whether a weight has two values, which of them each one is, eight of them a byte."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["binary_value", "by_unit", "is_two_valued", "pack_bits", "unpack_bits"]


def is_two_valued(weight: Tensor, unit_dims: tuple[int, ...] = (0,)) -> bool:
    """Whether each filter of a convolved weight, which is what ``unit_dims`` count, holds at most two values.

    That is up to a thousandth of their distance or, if that is larger, of their size, or a few roundings of a coarser
    dtype: hosts that write sign(w).detach() − w.detach() + w leave rounding.
    """
    rows = by_unit(weight, unit_dims).float()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    from_nearest = torch.minimum(rows - low, high - rows)
    scale = torch.maximum(high - low, rows.abs().amax(1, keepdim=True))
    return bool((from_nearest <= _tolerance(weight.dtype) * scale).all())


def binary_value(weight: Tensor, unit_dims: tuple[int, ...] = (0,)) -> Tensor:
    """One bool a weight: the upper of its filter's two values (+1 of ±1, 1 of {0, 1}), its sign if there is but one."""
    dims = tuple(d for d in range(weight.ndim) if d not in unit_dims)
    low, high = weight.amin(dims, keepdim=True), weight.amax(dims, keepdim=True)
    of_one_sign = torch.minimum(low.abs(), high.abs()) * low.sign() * high.sign() > 0
    apart = high - low > _tolerance(weight.dtype) * torch.maximum(high, -low)
    return weight > torch.where(of_one_sign & apart, (low + high) / 2, 0.0)


def by_unit(weight: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """One row an output unit."""
    units = weight.movedim(unit_dims, tuple(range(len(unit_dims))))
    return units.reshape(math.prod(units.shape[: len(unit_dims)]), -1)


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def pack_bits(bits: Tensor) -> Tensor:
    """Eight bools a byte, the first in the least significant bit; uint8 of ⌈n/8⌉."""
    flat = F.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:numel].bool()
