"""Inner products of large tensors, which take a way of their own through memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from hbnn_plugin.geometry import passes

SHAPE = (96, 320, 3, 3)
FILTER, LAYER, UNIT = (1, 2, 3), (0, 1, 2, 3), (0, 2, 3)


def tensors(dtype: torch.dtype, layouts: tuple[str, str]) -> list[Tensor]:
    formats = {"rows": torch.contiguous_format, "channels last": torch.channels_last}
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPE, generator=generator, dtype=dtype).contiguous(memory_format=formats[x]) for x in layouts]
    assert made[0].numel() >= passes._LARGE
    return made


@pytest.mark.parametrize("dims", [FILTER, LAYER, UNIT])
@pytest.mark.parametrize("layouts", [("rows",) * 2, ("channels last",) * 2, ("rows", "channels last")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_of_large_tensors(dtype: torch.dtype, layouts: tuple[str, str], dims: tuple[int, ...]) -> None:
    x, y = tensors(dtype, layouts)
    exact = (x.double() * y.double()).sum(dims, keepdim=True)
    found = passes.inner(x, y, dims, scratch=torch.empty_like(x))
    assert found.shape == exact.shape and found.dtype == torch.float64
    lengths = x.double().square().sum(dims, keepdim=True).sqrt() * y.double().square().sum(dims, keepdim=True).sqrt()
    assert ((found - exact).abs() / lengths).max() < 8 * torch.finfo(dtype).eps


def test_large_tensors_alike_in_memory_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    way = passes._products_of_rows
    monkeypatch.setattr(passes, "_products_of_rows", lambda x, y: rows.append(len(x)) or way(x, y))
    for layouts in (("rows",) * 2, ("channels last",) * 2, ("rows", "channels last")):
        x, y = tensors(torch.float32, layouts)
        for dims in (FILTER, LAYER, UNIT):
            passes.inner(x, y, dims, scratch=torch.empty_like(x))
    assert rows == [SHAPE[0]] * 4  # a point per filter and per layer, in either layout


def test_a_single_row_is_read_to_its_end_and_no_further() -> None:
    x, y = torch.randn(2, 1, 2 * passes._LARGE)[..., : passes._LARGE]
    found = passes.inner(x, y, (1,), scratch=torch.empty_like(x))
    torch.testing.assert_close(found, (x.double() * y.double()).sum(1, keepdim=True), rtol=0, atol=1e-2)


def test_long_rows_keep_their_digits() -> None:
    x, y = torch.rand(2, 8, 2**18)
    found = passes.inner(x, y, (1,), scratch=torch.empty_like(x))
    torch.testing.assert_close(found, (x.double() * y.double()).sum(1, keepdim=True), rtol=1e-6, atol=0)


def test_no_warning_about_sparse_tensors_reaches_the_user() -> None:
    passes._diagonal.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = tensors(torch.float32, ("rows",) * 2)
        passes.inner(x, y, FILTER, scratch=torch.empty_like(x))


def test_a_number_that_is_not_finite_stays_in_its_row() -> None:
    x, y = tensors(torch.float32, ("rows",) * 2)
    x[3, 5, 1, 1] = float("inf")
    found = passes.inner(x, y, FILTER, scratch=torch.empty_like(x)).flatten()
    assert not found[3].isfinite() and found[torch.arange(len(found)) != 3].isfinite().all()
