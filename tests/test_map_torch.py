"""The maps in torch's hands: dtypes from half precision up, vmap, double backward, compile and export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hbnn_plugin import ball, exp_map, log_map, mobius_add, mobius_scale, sphere
from map_points import SPACES, inside, on_sphere


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("reach", [0.0, 0.5, 0.999])
def test_finite_with_finite_gradients_for_whatever_the_dtype_can_hold(
    space: str, dtype: torch.dtype, size: int, reach: float
) -> None:
    r = 0.05
    info = torch.finfo(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    direction = torch.ones(1, size, dtype=working)
    p = inside(direction, 1.0 if space == "sphere" else reach, r).requires_grad_()
    for magnitude in (
        0.0,
        info.smallest_normal,
        info.tiny * 4,
        1e-3,
        1.0,
        100.0,
        info.max**0.5,
        info.max / 4,
        info.max,
    ):
        for sign in (1.0, -1.0):
            v = torch.full((1, size), magnitude, dtype=dtype).mul_(sign).requires_grad_()
            x = exp_map(p, v, r, SPACES[space])
            assert x.dtype == dtype and bool(x.isfinite().all()), (magnitude, sign, x)
            grad_p, grad_v = torch.autograd.grad(x.to(working).sum(), (p, v))
            assert grad_p.isfinite().all() and grad_v.isfinite().all(), (magnitude, sign, grad_p, grad_v)
            if space == "ball":
                # with p at the margin and v straight through the origin, float32's rounding is 1e-4 of the radius and
                # float64's 1e-9
                slack = 1e-8 if dtype == torch.float64 else 1e-3
                assert float(x.detach().double().norm()) <= r**-0.5 * (1 + slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(4, 9, generator=generator).to(dtype)
    p = inside(torch.randn(4, 9, generator=generator), 0.99, 0.05)
    assert torch.equal(exp_map(p, v, 0.05), exp_map(p, v.float(), 0.05).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exp_map(p, v.float(), 0.05), exp_map(p.double(), v.float(), 0.05))
        assert exp_map(p, v.float(), 0.05).dtype == torch.float32


@pytest.mark.parametrize("size", [5, 4096])
def test_gradients_of_a_batch_of_upstream_gradients(size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    p, v = (0.01 * torch.randn(2, 70, size, generator=generator)).unbind()
    v.requires_grad_()
    x = exp_map(p, v, 0.05)
    upstream = torch.randn(3, *v.shape, generator=generator)
    (together,) = torch.autograd.grad(x, v, upstream, is_grads_batched=True, retain_graph=True)
    for one, g in zip(together, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(x, v, g, retain_graph=True)[0], rtol=1e-5, atol=1e-7)


def test_float32_loses_nothing_against_float64() -> None:
    """1e-5 relative, gradients included, for a whole layer in one point and for one point a filter."""
    generator = torch.Generator().manual_seed(4)
    for shape, dims, size in (((1, 500_000), (-1,), 3.0), ((64, 4608), (-1,), 1.4)):
        v = torch.randn(shape, generator=generator)
        v = (v / v.norm(dim=-1, keepdim=True) * size).requires_grad_()
        p = inside(torch.randn(shape, generator=generator), 0.3, 0.05).requires_grad_()
        upstream = torch.randn(shape, generator=generator)
        exact = [t.detach().double().requires_grad_() for t in (p, v)]
        x, y = exp_map(p, v, 0.05, ball, dims), exp_map(*exact, 0.05, ball, dims)
        pairs = [
            (x, y),
            *zip(torch.autograd.grad(x, (p, v), upstream), torch.autograd.grad(y, exact, upstream.double())),
        ]
        for mine, reference in pairs:
            assert float(((mine.double() - reference).norm() / reference.norm()).detach()) < 1e-5


R = 0.3


def in_ball(x: Tensor) -> Tensor:
    return inside(x, 0.5, R)


def onto_sphere(x: Tensor) -> Tensor:
    return on_sphere(x, R)


def anywhere(x: Tensor) -> Tensor:
    return x


MAPS = {
    "exp_map, ball": (lambda p, v: exp_map(p, v, R), in_ball, anywhere),
    "exp_map, sphere": (lambda p, v: exp_map(p, v, R, sphere), onto_sphere, anywhere),
    "log_map, ball": (lambda p, x: log_map(p, x, R), in_ball, in_ball),
    "log_map, sphere": (lambda p, x: log_map(p, x, R, sphere), onto_sphere, onto_sphere),
    "mobius_add": (lambda p, v: mobius_add(p, v, R), in_ball, in_ball),
    "mobius_scale": (lambda p, v: mobius_scale(p[..., :1], v, R), anywhere, in_ball),
}
each_map = pytest.mark.parametrize("name", MAPS)


def map_and_operands(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    function, first, second = MAPS[name]
    p, v = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).unbind()
    return function, first(p), second(v)


@each_map
def test_vmap_over_points_and_its_gradients(name: str) -> None:
    one, p, v = map_and_operands(name)
    assert torch.allclose(torch.func.vmap(one)(p, v), one(p, v), atol=1e-14)
    assert torch.allclose(torch.func.vmap(one, (None, 0))(p[0], v), one(p[:1].expand_as(v), v), atol=1e-14)

    def loss(v: Tensor, p: Tensor) -> Tensor:
        return one(p, v).pow(3).sum()

    batched = torch.func.vmap(torch.func.grad(loss))(v, p)
    assert torch.allclose(batched, torch.stack([torch.func.grad(loss)(a, b) for a, b in zip(v, p)]), atol=1e-12)

    def curvature(v: Tensor, p: Tensor) -> Tensor:
        return torch.func.grad(lambda u: torch.func.grad(loss)(u, p).sum())(v)

    second = torch.func.vmap(curvature)(v, p)
    assert torch.allclose(second, torch.stack([curvature(a, b) for a, b in zip(v, p)]), atol=1e-10)


@each_map
def test_derivatives_of_first_and_second_order(name: str) -> None:
    function, p, v = map_and_operands(name)
    operands = p[:2].clone().requires_grad_(), v[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


@each_map
def test_exports(name: str) -> None:
    function, p, v = map_and_operands(name)

    class Module(torch.nn.Module):
        def forward(self, p: Tensor, v: Tensor) -> Tensor:
            return function(p, v)

    exported = torch.export.export(Module(), (p, v)).module()
    assert torch.allclose(exported(p, v), function(p, v), atol=1e-12)


def test_vmap_with_one_radius_a_point() -> None:
    generator = torch.Generator().manual_seed(9)
    p, v = (torch.randn(4, 6, dtype=torch.float64, generator=generator) * 0.2 for _ in range(2))
    r = torch.tensor([0.05, 0.1, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(exp_map)(p, v, r[:, None]), exp_map(p, v, r[:, None]), atol=1e-14)


@each_map
def test_compiles_in_one_graph_with_equal_values_and_gradients(name: str) -> None:
    function, p, v = map_and_operands(name)
    p, v = p.float(), v.float()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs = []
    for f in (function, compiled):
        latent = v.clone().requires_grad_()
        x = f(p, latent)
        outputs.append((x.detach(), torch.autograd.grad(x.pow(2).sum(), latent)[0]))
    for mine, reference in zip(*outputs, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-5)


def test_no_points_at_all() -> None:
    assert exp_map(torch.zeros(0, 4), torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_broadcasting_and_half_precision_of_the_public_maps() -> None:
    p, v = torch.full((1, 4), 0.2), torch.randn(5, 4)
    assert torch.allclose(exp_map(p, v, 0.05), exp_map(p.expand(5, 4), v, 0.05))
    x = torch.full((1, 2), 3.14, dtype=torch.bfloat16)
    assert mobius_add(x, -x, 0.05).abs().max() < 1e-5
    for f in (lambda t: mobius_add(t, 0.1 * t, 0.05), lambda t: mobius_scale(1.5, t, 0.05)):
        assert torch.equal(f(x), f(x.float()).to(torch.bfloat16))
