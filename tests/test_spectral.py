"""The orthogonal factor against the singular value decomposition, and the points' step that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hbnn_plugin
from geoopt_loop import newton_schulz
from hbnn_plugin.cluster.epc import find
from hbnn_plugin.geometry.exponential import exp_map
from hbnn_plugin.geometry.spectral import orthogonal_factors
from tiny_hosts import SmoothConv, loss_of, same_state, state
from training_helpers import applied


def orthogonal_factor(matrix: Tensor) -> Tensor:
    (factor,) = orthogonal_factors([matrix])
    return factor


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


def test_many_matrices_at_once_and_wide_ones_in_blocks_of_rows() -> None:
    shapes = [(4, 9), (300, 200), (4, 9), (200, 9), (64, 300), (9, 4), (97, 150)]
    split = {(300, 200): 60, (97, 150): 49}
    matrices = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = orthogonal_factors(matrices)
    assert orthogonal_factors([]) == []
    for matrix, factor in zip(matrices, found, strict=True):
        blocks = matrix.split(split.get(tuple(matrix.shape), len(matrix)))
        assert torch.allclose(factor, torch.cat([orthogonal_factor(block) for block in blocks]), rtol=0, atol=1e-12)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "channels last": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 5)),
    "1-D, more filters than coordinates": (lambda: nn.Conv1d(2, 8, 3), (2, 2, 9)),
}


@pytest.mark.filterwarnings("ignore:.*two-valued")
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_from_the_origin_is_the_orthogonal_factor_of_the_layers_gradient(
    kind: str, per: Any, relative: bool
) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    layer, bare = make().double(), make().double()
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "channels last":
        layer.to(memory_format=torch.channels_last)
    model = nn.Sequential(layer)
    only = {"where": lambda module, name: module is layer, "mode": "parametrize"}
    hbnn_plugin.apply(model, rule="spectral", per=per, relative=relative, **only)
    epc = find(layer)["weight"]
    point = torch.zeros_like(epc.point, requires_grad=True)
    mapped = {"weight": exp_map(point, epc.parameter.detach(), epc.radius, dims=epc.dims), "bias": layer.bias.detach()}
    for y in (torch.func.functional_call(bare, mapped, (x,)), model(x)):
        (y**3).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()

    def rows(t: Tensor) -> Tensor:  # one output unit a row
        return (t.transpose(0, 1) if kind == "transposed" else t).flatten(1)

    assert point.grad is not None
    gradient = rows(point.grad)
    wide = gradient if len(gradient) <= gradient.shape[1] else gradient.T
    factor = newton_schulz(wide) if wide is gradient else newton_schulz(wide).T
    moved = rows(epc.point if epc.scale is None else epc.point / epc.scale)
    assert torch.allclose(moved, -0.15 * 0.1**0.75 * factor, rtol=0, atol=1e-9)


def test_a_step_inside_autocast_is_in_single_precision() -> None:
    nets = [applied(SmoothConv), applied(SmoothConv)]
    for net, inside in zip(nets, (False, True), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loss_of(net).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            optimizer.step()
    assert same_state(*map(state, nets))
