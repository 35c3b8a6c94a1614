r"""The orthogonal factor of a matrix: the direction of steepest descent under the spectral norm.

For G = U Σ Vᵀ it is U Vᵀ: every singular direction moves equally far, however large its gradient is. As in Muon
(Jordan et al., 2024; Bernstein and Newhouse, arXiv:2409.20325) it is approximated by five steps of an odd polynomial,

    X ← q(X Xᵀ) X,   q(A) = 3.4445 − 4.7750 A + 2.0315 A²,   X₀ = G / ‖G‖_F,

which brings singular values from 0.003 on to 0.7 … 1.2. All iterates are G times a polynomial in one Gram matrix, so
the steps are made on that square matrix of G's short side alone, and G itself is passed over twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonal_factor"]

_STEPS = 5
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """U Vᵀ of a 2-D float32 or float64 matrix, approximately; zero for a zero matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal_factor(matrix.T).T
    size = matrix.abs().amax().clamp(min=torch.finfo(matrix.dtype).tiny)
    unit = matrix / size  # ‖G‖² itself may overflow, or vanish
    unit = unit / unit.norm().clamp(min=1e-30)
    gram = unit @ unit.T
    factor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    a, b, c = _POLYNOMIAL
    for step in range(_STEPS):
        q = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal().add_(a)
        factor = q @ factor  # polynomials in one matrix: they commute, and with the Gram matrix
        if step < _STEPS - 1:
            gram = q @ gram @ q
    result: Tensor = factor @ unit
    return result
