"""A layer's points, or what belongs to them, as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..cluster.epc import EPC
from ..geometry.passes import lie_alike, rows_of

__all__ = ["as_matrix", "as_vector", "coordinates", "flatten", "unflatten"]


def coordinates(epc: EPC) -> tuple[int, ...]:
    """The dimensions of one filter, whatever a point covers."""
    return tuple(d for d in range(epc.point.ndim) if d not in epc.unit_dims)


def as_matrix(g: Tensor, epc: EPC) -> Tensor:
    """g as a matrix, a row an output unit; a row's coordinates are in the order in which they lie in memory."""
    return rows_of(g) if _lies_in_units(g, epc) else flatten(g, coordinates(epc))


def as_vector(matrix: Tensor, g: Tensor, epc: EPC) -> Tensor:
    """What :func:`as_matrix` makes ``matrix`` of, lying in memory as ``g``."""
    if _lies_in_units(g, epc):
        return matrix.contiguous().as_strided(g.shape, g.stride())
    return torch.empty_like(g).copy_(unflatten(matrix, g.shape, coordinates(epc)))


def _lies_in_units(g: Tensor, epc: EPC) -> bool:
    return epc.unit_dims == (0,) and lie_alike([g])


def flatten(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A matrix with ``dims`` along its rows, as geoopt's manifolds want their last dimension."""
    kept = [d for d in range(tensor.ndim) if d not in dims]
    return tensor.permute(*kept, *dims).reshape(math.prod(tensor.shape[d] for d in kept), -1)


def unflatten(rows: Tensor, shape: torch.Size, dims: tuple[int, ...]) -> Tensor:
    """The tensor of ``shape`` that `flatten` made ``rows`` of."""
    order = [*(d for d in range(len(shape)) if d not in dims), *dims]
    return rows.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
