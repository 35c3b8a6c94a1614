"""The orthogonal factor against the singular value decomposition and against the iteration on the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoopt_loop import newton_schulz
from hbnn_plugin.spectral import orthogonal_factor


@given(st.integers(1, 12), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 1000))
def test_singular_directions_stay_and_singular_values_come_near_one(
    rows: int, columns: int, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 10**exponent
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal_factor(matrix) @ vh.T
    off = found - torch.diag(found.diagonal())
    assert off.abs().max() < 1e-9
    resolved = values > 0.005 * values.norm()
    assert ((found.diagonal() > 0.65) & (found.diagonal() < 1.25))[resolved].all()


@given(st.integers(1, 8), st.integers(16, 40), st.integers(0, 1000))
def test_the_gram_form_is_the_usual_iteration(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    usual = newton_schulz(matrix)
    assert torch.allclose(orthogonal_factor(matrix), usual, rtol=0, atol=1e-12)
    assert torch.allclose(orthogonal_factor(matrix.float()).double(), usual, rtol=0, atol=2e-5)
    assert torch.allclose(orthogonal_factor(matrix.T).T, orthogonal_factor(matrix), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_ill_conditioned_matrices_stay_finite(dtype: torch.dtype) -> None:
    assert not orthogonal_factor(torch.zeros(3, 5, dtype=dtype)).any()
    basis = torch.linalg.qr(torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    graded = (torch.logspace(0, -20, 12, dtype=torch.float64)[:, None] * basis).to(dtype)
    values = torch.linalg.svdvals(orthogonal_factor(graded))
    assert values.max() < 1.25
    huge = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    assert orthogonal_factor(huge).isfinite().all()
