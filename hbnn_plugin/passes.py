"""Passes over weight tensors: all that is ever done with as many numbers as there are weights.

Everything the plugin computes is inner products of weight-sized tensors (:func:`inner`) and linear combinations of
them (:func:`combine`), with one scalar a point in between. Both take several of torch's operators, each of which would
read and write whole tensors. So where nobody watches the single operators (autograd, functorch, a compiler), a CPU
does them block by block: what one operator leaves is still in the cache when the next one reads it, and no temporary is
larger than a block (fresh memory, page by page, costs more than the arithmetic on it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Dims", "combine", "inner", "scalar_dtype", "working_dtype"]

Dims = tuple[int, ...]
"""The dimensions of one point; the others count points."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 or better: in half precision a point at the margin has no digits left for its distance to the edge."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """float64 for what is one number a point, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


_BLOCK = 2**17
"""Numbers in a block: half a megabyte in float32."""


def inner(x: Tensor, y: Tensor, dims: Dims, *, exact: bool = False, unwatched: bool = False) -> Tensor:
    """⟨x, y⟩ over ``dims`` (kept with size 1) as float64.

    Summed in the tensors' dtype or, if ``exact``, in float64. ``unwatched``: nobody has to see the single operators.
    """
    wide = scalar_dtype(x.device)
    if exact:
        return (x.to(wide) * y.to(wide)).sum(dims, keepdim=True)
    if not unwatched:
        return (x * y).sum(dims, keepdim=True).to(wide)
    if x is y:
        return _square(x, dims, wide)
    rows = _rows_in_a_block(x)
    product = torch.empty_like(x[:rows])
    parts = zip(x.split(rows), y.split(rows))
    sums = [torch.mul(a, b, out=product[: len(a)]).sum(dims, keepdim=True) for a, b in parts]
    joined = torch.cat(sums).to(wide)
    return joined.sum(0, keepdim=True) if any(d % x.ndim == 0 for d in dims) else joined


def _rows_in_a_block(x: Tensor) -> int:
    if not x.is_cpu or x.numel() <= _BLOCK:
        return len(x)
    return max(1, _BLOCK * len(x) // x.numel())


def _square(x: Tensor, dims: Dims, wide: torch.dtype) -> Tensor:
    """‖x‖² in one pass: norms of rows, squared and summed in float64.

    Not one norm over all: on a CPU that sums sequentially and loses four digits over a layer of 2 million weights.
    """
    rows = tuple(d for d in dims if d % x.ndim)
    norms = torch.linalg.vector_norm(x, dim=rows, keepdim=True).to(wide) if rows else x.to(wide)
    return (norms * norms).sum(dims, keepdim=True)


def combine(
    coefficients: Sequence[Tensor], vectors: Sequence[Tensor], out: Tensor | None = None, *, unwatched: bool = False
) -> Tensor:
    """Σ c_i x_i, one coefficient a point, in the vectors' dtype and in the first one's memory format.

    ``unwatched``: nobody has to see the single operators. Then the result may go into ``out``, which may be the first
    vector.
    """
    dtype = vectors[0].dtype
    coefficients = [c.to(dtype) for c in coefficients]
    if not unwatched:
        result = vectors[0] * coefficients[0]
        for coefficient, vector in zip(coefficients[1:], vectors[1:]):
            result = torch.addcmul(result, coefficient, vector)
        return result
    if out is None:
        out = torch.empty_like(vectors[0])
    rows = _rows_in_a_block(out)
    blocks = out.split(rows)
    operands = [_parts(t, rows, len(blocks)) for t in (*coefficients, *vectors)]
    for block, *parts in zip(blocks, *operands):
        (c, *others), (x, *more) = parts[: len(vectors)], parts[len(vectors) :]
        torch.mul(x, c, out=block)
        for coefficient, vector in zip(others, more):
            block.addcmul_(coefficient, vector)
    return out


def _parts(t: Tensor, rows: int, count: int) -> Sequence[Tensor]:
    """By blocks of rows; what has one row for all is in every block."""
    return t.split(rows) if len(t) > 1 else [t] * count
