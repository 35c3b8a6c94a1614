"""The passes of several layers together.

A pass over a small layer takes less time than the calls that make it, and each layer needs some hundred of them a step.
So the rows of small layers are put side by side in one matrix for each length of row, and combinations are made by
torch's foreach functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .dtypes import scalar_dtype
from .passes import Dims, covers_rows, inner, lie_alike, rows_of

__all__ = ["combine_each", "inner_products", "places_of_equals"]

_SMALL, _SMALL_ELSEWHERE = 2**16, 2**20
"""Up to so many numbers, on a CPU and elsewhere, the calls that are saved by putting a tensor beside others cost more
than copying it. (Measured on CPUs; a GPU copies faster and calls no faster.)"""


def places_of_equals(keys: Iterable[object]) -> list[list[int]]:
    """For each key, where among all it stands: what is alike is worked on together."""
    found: dict[object, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        found[key].append(i)
    return [*found.values()]


def inner_products(
    vectors: Sequence[Sequence[Tensor]],
    pairs: Sequence[tuple[int, int]],
    dims: Sequence[Dims],
    *,
    exact: bool = False,
    scratch: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """:func:`inner` of the ``pairs`` (i, j) of each layer's vectors: (pairs, points), one layer's points after another.

    ``vectors``: for each layer as many tensors of its shape; ``dims`` and ``scratch`` (for None fresh): one a layer;
    ``exact``: sums in float64.
    """
    found: dict[int, Tensor] = {}
    small: list[int] = []
    for n, (x, *_) in enumerate(vectors):
        if x.ndim > 1 and 0 < x.numel() <= (_SMALL if x.is_cpu else _SMALL_ELSEWHERE) and covers_rows(dims[n], x.ndim):
            small.append(n)
        else:
            xs, memory = vectors[n], scratch[n] if scratch else None
            if exact:
                xs, memory = [x.to(scalar_dtype(x.device)) for x in xs], None
            elif memory is None:
                memory = torch.empty_like(x)
            found[n] = torch.stack([inner(xs[i], xs[j], dims[n], scratch=memory) for i, j in pairs]).flatten(1)
    firsts = [vectors[n][0] for n in small]
    for places in places_of_equals((x.numel() // len(x), x.dtype, x.device) for x in firsts):
        members = [small[place] for place in places]
        products = _side_by_side([vectors[n] for n in members], pairs, exact)
        sizes = [len(vectors[n][0]) for n in members]
        for n, part in zip(members, products.split(sizes, dim=1)):
            covers_all = len(dims[n]) == vectors[n][0].ndim
            found[n] = part.sum(1, keepdim=True) if covers_all else part
    return torch.cat([found[n] for n in range(len(vectors))], dim=1)


def _side_by_side(vectors: Sequence[Sequence[Tensor]], pairs: Sequence[tuple[int, int]], exact: bool) -> Tensor:
    """The inner products of each row; all rows are of one length."""
    layers = [[rows_of(x) for x in xs] if lie_alike(xs) else [x.flatten(1) for x in xs] for xs in vectors]
    rows = torch.cat([x for kind in zip(*layers) for x in kind]).unflatten(0, (len(layers[0]), -1))
    wide = scalar_dtype(rows.device)
    if exact:
        rows = rows.to(wide)
        return torch.stack([(rows[i] * rows[j]).sum(1) for i, j in pairs])
    squares = torch.linalg.vector_norm(rows, dim=2).to(wide).square()
    return torch.stack([squares[i] if i == j else (rows[i] * rows[j]).sum(1).to(wide) for i, j in pairs])


def combine_each(
    coefficients: Tensor, vectors: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[int]], out: Sequence[Tensor]
) -> None:
    """:func:`combine` for several layers of one dtype; ``coefficients`` are (vectors a layer, points), side by side.

    ``shapes``: in which each layer's points are counted. ``out``: a layer's first vector will do, none of the others.
    """
    sizes = [math.prod(shape) for shape in shapes]
    parts = coefficients.to(out[0].dtype).split(sizes, dim=1)
    each = [part.reshape(len(part), *shape).unbind() for part, shape in zip(parts, shapes)]
    for memory, c, xs in zip(out, each, vectors):
        torch.mul(xs[0], c[0], out=memory)
    for k in range(1, len(coefficients)):
        torch._foreach_addcmul_(list(out), [xs[k] for xs in vectors], [c[k] for c in each])
