r"""The orthogonal factor of a matrix: the direction of steepest descent under the spectral norm.

For G = U Σ Vᵀ it is U Vᵀ: every singular direction moves equally far, however large its gradient is. As in Muon
(Jordan et al., 2024; Bernstein and Newhouse, arXiv:2409.20325) it is approximated by five steps of an odd polynomial,

    X ← q(X Xᵀ) X,   q(A) = 3.4445 − 4.7750 A + 2.0315 A²,   X₀ = G / ‖G‖_F,

which brings singular values from 0.003 on to 0.7 … 1.2. All iterates are G times a polynomial in one Gram matrix, so
the steps are made on that square matrix of G's short side alone, and G itself is passed over twice.

That costs (short side)² · (long side), which in the widest layers would be a tenth of a training step: there the rows
are taken in blocks of at most 64, each with a factor of its own, for a ninth of the cost at 512.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .joint_passes import places_of_equals
from .passes import largest

__all__ = ["longer_side", "orthogonal_factors"]

_STEPS = 5
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
_BLOCK = 64
"""At most so many rows at a time, unless the columns are as few; the widest layers that were measured had as many."""


def _factors(stacks: Sequence[Tensor]) -> list[Tensor]:
    """The factors of each stack of matrices, (count, m, n); Gram matrices of one size are worked on together."""
    with contextlib.ExitStack() as without_autocast:  # in a loop that steps inside autocast
        for device in {stack.device for stack in stacks}:
            without_autocast.enter_context(_no_autocast(device))
        wide = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
        # ‖G‖² may overflow, or vanish: its largest entry first
        units = [stack / largest(stack, (1, 2)).clamp(min=torch.finfo(stack.dtype).tiny) for stack in wide]
        grams = [torch.bmm(unit, unit.mT) for unit in units]
        roots: dict[int, Tensor] = {}
        for members in places_of_equals((gram.shape[1], gram.dtype, gram.device) for gram in grams):
            together = _polynomial(_joined([grams[i] for i in members]))
            roots.update(zip(members, together.split([len(grams[i]) for i in members])))
        found = [torch.bmm(roots[i], unit) for i, unit in enumerate(units)]
    return [factor if stack is whole else factor.mT for factor, stack, whole in zip(found, wide, stacks)]


def _polynomial(gram: Tensor) -> Tensor:
    """What the steps make of X₀ is this times G, for the Gram matrices of a stack of G."""
    norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-30).sqrt()
    gram = gram / (norm * norm)
    a, b, c = _POLYNOMIAL
    factor = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for step in range(_STEPS):  # all are polynomials in one matrix: they commute
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # q(A) − a
        factor = torch.baddbmm(factor, rest, factor, beta=a)
        if step < _STEPS - 1:
            half = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(half, half, rest, beta=a)
    return factor / norm


def _blocks(rows: int, columns: int) -> int:
    return math.ceil(rows / _BLOCK) if min(rows, columns) > _BLOCK else 1


def longer_side(rows: int, columns: int) -> int:
    """n of :func:`orthogonal_factors`, whose entries have the root mean square 1/√n."""
    return columns if _blocks(rows, columns) > 1 else max(rows, columns)


def orthogonal_factors(matrices: Sequence[Tensor]) -> list[Tensor]:
    """U Vᵀ of each float32 or float64 matrix, approximately; zero for a zero matrix.

    In blocks of rows if it is large; they are worked out together.
    """
    stacks = [_in_blocks(matrix) for matrix in matrices]
    # On a CPU each large one by itself: fresh memory for several costs more than the calls that it saves.
    large = [stack.is_cpu and len(stack) > 1 for stack in stacks]
    groups = places_of_equals(
        (stack.shape[1:], stack.dtype, stack.device, i if large[i] else None) for i, stack in enumerate(stacks)
    )
    alone = [[group] for group in groups if large[group[0]]]
    found: dict[int, Tensor] = {}
    for together in ([group for group in groups if not large[group[0]]], *alone):
        for group, factors in zip(together, _factors([_joined([stacks[i] for i in group]) for group in together])):
            found.update(zip(group, factors.split([len(stacks[i]) for i in group])))
    return [found[i].flatten(0, 1)[: len(matrix)] for i, matrix in enumerate(matrices)]


def _joined(stacks: Sequence[Tensor]) -> Tensor:
    return torch.cat([*stacks]) if len(stacks) > 1 else stacks[0]


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _in_blocks(matrix: Tensor) -> Tensor:
    """(blocks, rows of each, columns); rows of zeros, which change no factor, fill the last one up."""
    count = _blocks(*matrix.shape)
    if len(matrix) % count:
        matrix = torch.cat([matrix, matrix.new_zeros(-len(matrix) % count, matrix.shape[1])])
    return matrix.view(count, -1, matrix.shape[1])
