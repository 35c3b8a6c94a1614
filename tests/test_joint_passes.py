"""What is worked out for several layers together is what each of them alone would get."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hbnn_plugin import ball, sphere
from hbnn_plugin.geometry import joint_passes
from hbnn_plugin.geometry.exponential import exp_map, exp_map_mapped
from hbnn_plugin.geometry.joint_maps import Map, exp_maps, pull_back
from hbnn_plugin.geometry.joint_passes import combine_each, inner_products
from map_points import inside, on_sphere

FILTER, LAYER, UNIT = (1, 2, 3), (0, 1, 2, 3), (0, 2, 3)
SHAPES = [(8, 4, 3, 3), (5, 4, 3, 3), (6, 36, 1, 1), (3, 2, 1, 1), (64, 128, 3, 3), (1, 4, 3, 3)]


def layer(shape: tuple[int, ...], count: int, layouts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of a shape, each contiguous or channels_last as the bits of ``layouts`` say."""
    formats = torch.contiguous_format, torch.channels_last
    return [torch.randn(shape, dtype=dtype).contiguous(memory_format=formats[layouts >> i & 1]) for i in range(count)]


@given(
    st.lists(
        st.tuples(st.sampled_from(SHAPES), st.sampled_from([FILTER, LAYER, UNIT]), st.integers(0, 7)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.integers(0, 9),
)
def test_inner_products_of_several_layers(
    layers: list[tuple[tuple[int, ...], tuple[int, ...], int]], exact: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    vectors = [layer(shape, 3, layouts) for shape, _, layouts in layers]
    dims = [d for _, d, _ in layers]
    pairs = ((0, 0), (0, 1), (2, 1))
    found = inner_products(vectors, pairs, dims, exact=exact)
    expected, sizes = [], []
    for xs, d in zip(vectors, dims, strict=True):
        wide = [x.double() for x in xs]
        norms = [x.square().sum(d, keepdim=True).sqrt() for x in wide]
        expected.append(torch.stack([(wide[i] * wide[j]).sum(d, keepdim=True) for i, j in pairs]).flatten(1))
        sizes.append(torch.stack([norms[i] * norms[j] for i, j in pairs]).flatten(1))
    assert found.dtype == torch.float64
    off = (found - torch.cat(expected, dim=1)).abs() / torch.cat(sizes, dim=1)
    assert off.max() < (1e-14 if exact else 2e-6)


def test_small_layers_of_one_length_of_row_are_worked_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    original = joint_passes._side_by_side
    monkeypatch.setattr(
        joint_passes,
        "_side_by_side",
        lambda vectors, *rest: together.append(len(vectors)) or original(vectors, *rest),
    )
    shapes = [*SHAPES, (4, 2 * joint_passes._SMALL)]
    inner_products(
        [(torch.randn(shape),) * 2 for shape in shapes], ((0, 1),), [tuple(range(1, len(s))) for s in shapes]
    )
    assert sorted(together) == [1, 4]  # rows of 2 and of 36; the rest are large


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5), st.integers(0, 7), st.booleans())
def test_combinations_of_several_layers(shapes: list[tuple[int, ...]], layouts: int, over_the_first: bool) -> None:
    vectors = [layer(shape, 3, layouts, torch.float64) for shape in shapes]
    scalar_shapes = [(shape[0], 1, 1, 1) for shape in shapes]
    coefficients = torch.randn(3, sum(shape[0] for shape in shapes), dtype=torch.float64)
    parts = coefficients.split([shape[0] for shape in shapes], dim=1)
    expected = [
        sum(c.reshape(shape) * x for c, x in zip(part, xs, strict=True))
        for part, xs, shape in zip(parts, vectors, scalar_shapes, strict=True)
    ]
    out = [xs[0] if over_the_first else torch.empty_like(xs[0]) for xs in vectors]
    combine_each(coefficients, vectors, scalar_shapes, out)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other)


def maps() -> list[Map]:
    """Easy layers, one near the edge, one whose ‖v‖² overflows float32, one on the sphere, one in float64."""
    torch.manual_seed(0)
    rows = torch.randn(4, 10)
    return [
        Map(inside(rows, 0.3, 0.05), torch.randn(4, 10), 0.05, ball, (1,)),
        Map(inside(rows, 0.9995, 0.05), torch.randn(4, 10), 0.05, ball, (1,)),
        Map(inside(rows[:2], 0.5, 0.05), 1e25 * torch.randn(2, 10), 0.05, ball, (1,)),
        Map(on_sphere(rows, 1.0), torch.randn(4, 10), 1.0, sphere, (1,)),
        Map(inside(rows.double(), 0.3, 0.5), torch.randn(4, 10).double(), 0.5, ball, (1,)),
        Map(inside(rows, 0.1, 0.05), torch.randn(4, 10), torch.tensor([[0.05], [0.04], [0.03], [0.02]]), ball, (1,)),
    ]


def test_maps_of_several_layers_and_their_gradients() -> None:
    several = maps()
    memory = [torch.empty_like(m.latent) for m in several]
    assert all(made.weight is x for made, x in zip(exp_maps(several, memory), memory, strict=True))
    upstreams = [torch.randn_like(m.latent) for m in several]
    pulled = pull_back(several, upstreams)
    mapped = exp_maps(several)
    for m, x, upstream, gradient, made in zip(several, memory, upstreams, pulled, mapped, strict=True):
        latent = m.latent.clone().requires_grad_()
        alone = exp_map(m.point, latent, m.radius, m.space, m.dims)
        (expected,) = torch.autograd.grad(alone, latent, upstream)
        torch.testing.assert_close(x, alone.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        read = exp_map_mapped(m._replace(latent=latent), made)
        torch.testing.assert_close(read, alone, rtol=2e-6, atol=1e-6)
        (through,) = torch.autograd.grad(read, latent, upstream)
        torch.testing.assert_close(through, expected, rtol=1e-5, atol=1e-6)
    assert [made.prescaled for made in mapped] == [False, True, True, False, False, False]
