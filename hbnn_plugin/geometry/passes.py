"""Passes over weight tensors: all that is ever done with as many numbers as there are weights.

Everything the plugin computes is inner products of weight-sized tensors (:func:`inner`) and linear combinations of
them (:func:`combine`), with one scalar a point in between. A weight-sized temporary costs more than the arithmetic on
it (its memory is fresh, page by page), so products go into the memory that will hold the result. Several layers'
passes are made together by ``geometry/joint_passes.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .dtypes import scalar_dtype
from .looking import traced

__all__ = [
    "Dims",
    "combine",
    "covers_rows",
    "inner",
    "largest",
    "lie_alike",
    "rows_of",
]

Dims = tuple[int, ...]
"""The dimensions of one point; the others count points."""


def inner(x: Tensor, y: Tensor, dims: Dims, *, scratch: Tensor | None = None) -> Tensor:
    """⟨x, y⟩ over ``dims`` (kept with size 1) as float64, summed in the tensors' dtype.

    The product is written into ``scratch``, if given (autograd must not be watching then).
    """
    wide = scalar_dtype(x.device)
    if scratch is None:
        return (x * y).sum(dims, keepdim=True).to(wide)
    if x is y:
        return _square(x, dims, wide)
    if _in_rows(x, y, dims):
        return _products_of_rows(x, y).to(wide).reshape(-1, *[1] * (x.ndim - 1)).sum(dims, keepdim=True)
    return torch.mul(x, y, out=scratch).sum(dims, keepdim=True).to(wide)


def _square(x: Tensor, dims: Dims, wide: torch.dtype) -> Tensor:
    """‖x‖² in one pass: norms of rows, squared and summed in float64.

    Not one norm over all: on a CPU that sums sequentially and loses four digits over a layer of 2 million weights.
    """
    rows = tuple(d for d in dims if d % x.ndim)
    norms = torch.linalg.vector_norm(x, dim=rows, keepdim=True).to(wide) if rows else x.to(wide)
    return (norms * norms).sum(dims, keepdim=True)


def largest(x: Tensor, dims: Dims) -> Tensor:
    """max |x_i| over ``dims`` (kept with size 1), without a temporary; torch's norm for it is slow on a CPU."""
    if not x.is_cpu:
        norm: Tensor = torch.linalg.vector_norm(x, math.inf, dims, keepdim=True)
        return norm
    high, low = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
    return torch.maximum(high, -low).abs()  # not −0, by which one may divide


_LARGE = 2**18
"""From so many numbers on, what a call of torch.sparse costs is less than a second reading of the product."""
_LONG = 2**16
"""A row is summed from its beginning to its end: of so many numbers with too few digits."""


def _in_rows(x: Tensor, y: Tensor, dims: Dims) -> bool:
    """Whether x and y are large, lie in a CPU's memory alike, row after row (their first dimension), and no point
    covers part of a row."""
    return (
        x.is_cpu
        and _LARGE <= x.numel() < _LONG * len(x)
        and covers_rows(dims, x.ndim)
        and lie_alike((x, y))
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, y))  # a fake one has no memory
    )


def covers_rows(dims: Dims, ndim: int) -> bool:
    """Whether no point covers part of a row (of the first dimension)."""
    return {d % ndim for d in dims} >= set(range(1, ndim))


def lie_alike(xs: Sequence[Tensor]) -> bool:
    """Whether row after row (their first dimension), in the same order within each."""
    x = xs[0]
    return (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)) and all(
        (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype) for y in xs[1:]
    )


def rows_of(x: Tensor) -> Tensor:
    """A matrix of its rows as they lie in memory."""
    rows = x.shape[0]  # torch looks longer for a tensor's len()
    length = x.numel() // rows
    return x.as_strided((rows, length), (length, 1))


def _products_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """⟨x_i, y_i⟩ in one reading of both.

    torch's one kernel on a CPU that multiplies and sums without a temporary is that for entries of a matrix product.
    """
    products: Tensor = torch.sparse.sampled_addmm(_diagonal(len(x), x.dtype), rows_of(x), rows_of(y).mT, beta=0.0)
    return products.values()


@lru_cache(maxsize=64)
def _diagonal(size: int, dtype: torch.dtype) -> Tensor:
    """The places of a square matrix's diagonal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        rows, zeros = torch.arange(size + 1, device="cpu"), torch.zeros(size, dtype=dtype, device="cpu")
        return torch.sparse_csr_tensor(rows, rows[:-1], zeros, (size, size), check_invariants=False)


def combine(coefficients: Sequence[Tensor], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Σ c_i x_i, one coefficient a point, in the vectors' dtype; into ``out``, if given (the first vector will do)."""
    dtype = vectors[0].dtype
    result = torch.mul(vectors[0], coefficients[0].to(dtype), out=out)
    for coefficient, vector in zip(coefficients[1:], vectors[1:]):
        if torch.is_grad_enabled() or traced():  # who watches may have kept it: no writing over it
            result = torch.addcmul(result, coefficient.to(dtype), vector)
        else:
            result.addcmul_(coefficient.to(dtype), vector)
    return result
