"""The map on the ball and the sphere, its inverse and its gradients, against geoopt, mpmath and torch's gradcheck."""

from __future__ import annotations

import geoopt
import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hbnn_plugin import ball, exp_map, log_map, mobius_add, mobius_scale, sphere
from map_points import SPACES, inside, on_sphere

RADII = (0.01, 0.05, 1.0, 5.0)


def vectors(points: int = 3, size: int = 5) -> st.SearchStrategy[Tensor]:
    """Rows in [−1, 1]^n as float64, zeros and repeated coordinates included."""
    return arrays(float, (points, size), elements=st.floats(-1, 1, width=32)).map(torch.from_numpy)


def geoopt_ball(radius: float) -> geoopt.PoincareBallExact:
    # geoopt keeps a Python float in float32, which would cost seven digits
    return geoopt.PoincareBallExact(c=torch.tensor(radius, dtype=torch.float64))


def geoopt_sphere_exp(p: Tensor, v: Tensor, radius: float) -> Tensor:
    root = radius**0.5
    unit = geoopt.SphereExact()
    return unit.expmap(root * p, root * unit.proju(root * p, v)) / root


@given(vectors(), vectors(), st.floats(0, 0.98), st.floats(1e-6, 3), st.sampled_from(RADII))
@settings(max_examples=200)
def test_ball_agrees_with_geoopt_and_so_do_its_gradients(
    p: Tensor, v: Tensor, share: float, size: float, r: float
) -> None:
    p, v = inside(p, share, r).requires_grad_(), (inside(v, size, r)).requires_grad_()
    edge = r**-0.5
    ours, theirs = exp_map(p, v, r), geoopt_ball(r).expmap(p, v, project=False)
    # geoopt itself errs where the image comes within .99 of the edge; mpmath takes over there (below)
    near = (theirs.detach().norm(dim=-1) < 0.99 * edge) & (v.detach().norm(dim=-1) > 1e-9 * edge)
    assert torch.allclose(ours[near], theirs[near], rtol=0, atol=1e-10 * edge)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape) * near[:, None]
    for mine, reference in zip(
        torch.autograd.grad(ours, (p, v), upstream), torch.autograd.grad(theirs, (p, v), upstream), strict=True
    ):
        scale = 1 / (1 - share**2) ** 2
        assert torch.allclose(mine[near], reference[near], rtol=0, atol=1e-10 * edge * scale)


@given(vectors(), vectors(), st.floats(1e-6, 3), st.sampled_from(RADII))
@settings(max_examples=200)
def test_sphere_agrees_with_geoopt_and_so_do_its_gradients(p: Tensor, v: Tensor, size: float, r: float) -> None:
    p = on_sphere(p, r).requires_grad_()
    v = (v * size / r**0.5 + 1e-3).requires_grad_()
    ours, theirs = exp_map(p, v, r, sphere), geoopt_sphere_exp(p, v, r)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 * r**-0.5)
    assert torch.allclose(ours.norm(dim=-1), torch.full((3,), r**-0.5, dtype=torch.float64), rtol=1e-12)
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
    (mine,) = torch.autograd.grad(ours, v, upstream, retain_graph=True)
    (reference,) = torch.autograd.grad(theirs, v, upstream, retain_graph=True)
    assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-10)
    # by p only the tangential part has a meaning: p cannot leave the sphere
    mine, reference = (
        geoopt.SphereExact().proju(p * r**0.5, torch.autograd.grad(x, p, upstream)[0]) for x in (ours, theirs)
    )
    assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-9)


def mp_ball(p: list[float], v: list[float], r: float) -> list[float]:
    mp = mpmath.mp
    r_, p_, v_ = mp.mpf(r), [mp.mpf(a) for a in p], [mp.mpf(a) for a in v]
    pp, norm = sum(a * a for a in p_), mp.sqrt(sum(a * a for a in v_))
    length = mp.tanh(mp.sqrt(r_) * norm / (1 - r_ * pp)) / (mp.sqrt(r_) * norm)
    y = [length * a for a in v_]
    py, yy = sum(a * b for a, b in zip(p_, y, strict=True)), sum(b * b for b in y)
    d = 1 + 2 * r_ * py + r_ * r_ * pp * yy
    return [float(((1 + 2 * r_ * py + r_ * yy) * a + (1 - r_ * pp) * b) / d) for a, b in zip(p_, y, strict=True)]


@given(vectors(1, 4), vectors(1, 4), st.floats(0.5, 0.999), st.floats(1e-8, 10), st.sampled_from(RADII))
@settings(max_examples=100)
def test_near_the_edge_ball_agrees_with_mpmath(p: Tensor, v: Tensor, share: float, size: float, r: float) -> None:
    p, v = inside(p + 0.1, share, r), inside(v + 0.05, size, r)
    with mpmath.workdps(60):
        expected = torch.tensor([mp_ball(p[0].tolist(), v[0].tolist(), r)], dtype=torch.float64)
    assert torch.allclose(exp_map(p, v, r), expected, rtol=0, atol=1e-10 * r**-0.5)


@pytest.mark.parametrize(("share", "size"), [(0.3, 0.8), (0.99, 1.5), (0.999, 0.5), (0.999, 3.0)])
def test_near_the_edge_gradients_agree_with_mpmath(share: float, size: float) -> None:
    r = 0.05
    generator = torch.Generator().manual_seed(0)
    p = inside(torch.randn(1, 3, dtype=torch.float64, generator=generator), share, r).requires_grad_()
    v = inside(torch.randn(1, 3, dtype=torch.float64, generator=generator), size, r).requires_grad_()
    grads = torch.autograd.grad(exp_map(p, v, r)[0, 0], (p, v))
    with mpmath.workdps(80):

        def first(*coordinates: float) -> mpmath.mpf:
            mp = mpmath.mp
            p_, v_ = coordinates[:3], coordinates[3:]
            r_ = mp.mpf(r)
            pp, norm = sum(a * a for a in p_), mp.sqrt(sum(a * a for a in v_))
            y = [mp.tanh(mp.sqrt(r_) * norm / (1 - r_ * pp)) / (mp.sqrt(r_) * norm) * a for a in v_]
            py, yy = sum(a * b for a, b in zip(p_, y, strict=True)), sum(b * b for b in y)
            return ((1 + 2 * r_ * py + r_ * yy) * p_[0] + (1 - r_ * pp) * y[0]) / (1 + 2 * r_ * py + r_ * r_ * pp * yy)

        at = tuple(mpmath.mpf(a) for a in [*p[0].tolist(), *v[0].tolist()])
        orders = [tuple(int(i == k) for i in range(6)) for k in range(6)]
        expected = torch.tensor([float(mpmath.diff(first, at, order)) for order in orders], dtype=torch.float64)
    ours = torch.cat([g.flatten() for g in grads])
    assert torch.allclose(ours, expected, rtol=1e-8, atol=1e-10)


@given(vectors(), vectors(), st.floats(0, 0.9), st.floats(0, 2), st.sampled_from(RADII))
@settings(max_examples=200)
def test_log_inverts_exp_on_the_ball(p: Tensor, v: Tensor, share: float, size: float, r: float) -> None:
    p = inside(p, share, r)
    v = inside(v, size, r) * (1 - share**2)  # the same reach in the ball wherever p is
    assert torch.allclose(log_map(p, exp_map(p, v, r), r), v, rtol=1e-7, atol=1e-9 * r**-0.5)
    x = inside(v + 0.1, share, r)
    assert torch.allclose(exp_map(p, log_map(p, x, r), r), x, rtol=0, atol=1e-10 * r**-0.5)


@given(vectors(), vectors(), st.sampled_from(RADII))
@settings(max_examples=100)
def test_log_inverts_exp_on_the_sphere(p: Tensor, x: Tensor, r: float) -> None:
    p, x = on_sphere(p, r), on_sphere(x, r)
    assert torch.allclose(exp_map(p, log_map(p, x, r, sphere), r, sphere), x, rtol=0, atol=1e-7 * r**-0.5)


@given(vectors(), vectors(), st.floats(0, 0.95), st.floats(-2, 2), st.sampled_from(RADII))
@settings(max_examples=200)
def test_mobius_operations_agree_with_geoopt(x: Tensor, y: Tensor, share: float, t: float, r: float) -> None:
    x, y = inside(x, share, r), inside(y, 0.7, r)
    manifold = geoopt_ball(r)
    assert torch.allclose(mobius_add(x, y, r), manifold.mobius_add(x, y, project=False), rtol=0, atol=1e-10 * r**-0.5)
    # left cancellation
    assert torch.allclose(mobius_add(-x, mobius_add(x, y, r), r), y, rtol=0, atol=1e-9 * r**-0.5)
    scaled = manifold.mobius_scalar_mul(torch.tensor(t, dtype=torch.float64), y, project=False)
    assert torch.allclose(mobius_scale(t, y, r), scaled, rtol=0, atol=1e-10 * r**-0.5)


def test_exp_is_the_mobius_sum_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(1)
    p, v = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    r = 0.05
    conformal = 2 / (1 - r * (p * p).sum(-1, keepdim=True))
    norm = v.norm(dim=-1, keepdim=True)
    y = torch.tanh(r**0.5 * conformal * norm / 2) * v / (r**0.5 * norm)
    assert torch.allclose(exp_map(p, v, r), mobius_add(p, y, r), atol=1e-13)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1, 2.0])
def test_gradcheck_first_and_second_order(space: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    r = 0.7
    v = (torch.randn(2, 4, dtype=torch.float64, generator=generator) * scale).requires_grad_()
    p = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    p = (on_sphere(p, r) if space == "sphere" else inside(p, 0.6, r)).requires_grad_()
    geometry = SPACES[space]

    # off the sphere the formula means nothing: p is moved tangentially there
    def latent(v: Tensor) -> Tensor:
        return exp_map(p.detach(), v, r, geometry)

    def both(p: Tensor, v: Tensor) -> Tensor:
        return exp_map(p, v, r, geometry)

    function, inputs = (latent, (v,)) if space == "sphere" else (both, (p, v))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("apart", [0.0, 1e-5, 0.5])
def test_gradcheck_of_the_inverse_also_where_both_points_meet(space: str, apart: float) -> None:
    generator = torch.Generator().manual_seed(3)
    r = 0.7
    p, away = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    v = apart * away
    if space == "sphere":  # off which the formula means nothing: x moves on the sphere, with its latent
        p = on_sphere(p, r)
        v = (v - r * (p * v).sum(-1, keepdim=True) * p).requires_grad_()

        def there_and_back(v: Tensor) -> Tensor:
            tangential = v - r * (p * v).sum(-1, keepdim=True) * p
            return log_map(p, exp_map(p, tangential, r, sphere), r, sphere)

        assert torch.autograd.gradcheck(there_and_back, (v,))
        torch.testing.assert_close(there_and_back(v), v, rtol=0, atol=1e-9)
    else:
        p = inside(p, 0.6, r)
        x = exp_map(p, v, r).requires_grad_()
        assert torch.autograd.gradcheck(lambda p, x: log_map(p, x, r), (p.requires_grad_(), x))


def test_the_inverse_at_the_antipode_is_finite_with_finite_gradients() -> None:
    p = on_sphere(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), 1.0)
    x = (-p).requires_grad_()
    v = log_map(p, x, 1.0, sphere)
    (gradient,) = torch.autograd.grad(v.sum(), x)
    assert v.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("space", SPACES)
def test_gradcheck_of_the_radius(space: str) -> None:
    generator = torch.Generator().manual_seed(5)
    p, v = (0.3 * torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    r = torch.tensor([[0.05], [0.5], [1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: exp_map(p, v, r, SPACES[space]), (r,))


@pytest.mark.parametrize("space", SPACES)
def test_the_radius_has_its_gradient_under_vmap_too(space: str) -> None:
    generator = torch.Generator().manual_seed(6)
    p, v = (0.3 * torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    r = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)

    def total(r: Tensor) -> Tensor:
        rows = torch.func.vmap(lambda p, v, r: exp_map(p, v, r[None], SPACES[space]))(p, v, r)
        return rows.sin().sum()

    alone = r[:, None].clone().requires_grad_()
    exp_map(p, v, alone, SPACES[space]).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(total)(r), alone.grad.flatten())


def test_one_radius_a_point() -> None:
    generator = torch.Generator().manual_seed(5)
    p, v = (torch.randn(3, 4, dtype=torch.float64, generator=generator) * 0.3 for _ in range(2))
    r = torch.tensor([[0.05], [0.5], [1.0]], dtype=torch.float64)
    rows = [exp_map(p[i], v[i], float(r[i])) for i in range(3)]
    assert torch.allclose(exp_map(p, v, r), torch.stack(rows), atol=1e-15)


def test_a_vanishing_radius_is_euclidean() -> None:
    generator = torch.Generator().manual_seed(6)
    p, v = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.allclose(exp_map(p, v, 1e-12), p + v, atol=1e-10)


def test_the_inverse_broadcasts_as_the_map_does() -> None:
    generator = torch.Generator().manual_seed(0)
    p, v = (0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5,), (3, 5)))
    for dims in ((0,), (1,), (0, 1)):
        x = exp_map(p, v, 0.5, dims=dims)
        torch.testing.assert_close(log_map(p, x, 0.5, dims=dims), v, rtol=1e-9, atol=1e-12)


def test_several_dimensions_make_one_point() -> None:
    generator = torch.Generator().manual_seed(7)
    p, v = (torch.randn(3, 2, 3, 3, generator=generator) * 0.3 for _ in range(2))
    flat = exp_map(p.flatten(1), v.flatten(1), 0.05).reshape(v.shape)
    assert torch.allclose(exp_map(p, v, 0.05, ball, (1, 2, 3)), flat, atol=1e-6)
    channels_last = exp_map(*(t.contiguous(memory_format=torch.channels_last) for t in (p, v)), 0.05, ball, (1, 2, 3))
    assert torch.allclose(channels_last, flat, atol=1e-6)


def test_point_steps_stay_inside_however_large() -> None:
    for gradient in (1e-8, 1.0, 1e6, 1e30):
        p = inside(torch.ones(1, 7, dtype=torch.float64), 0.999, 0.05)
        g = -gradient * torch.ones(1, 7, dtype=torch.float64)
        gram = [(p * p).sum(-1), (p * g).sum(-1), (g * g).sum(-1)]
        for eta in (1e-3, 1.0, 1e3):
            a, b = ball.point_step(*gram, torch.tensor([eta], dtype=torch.float64), 0.05)
            new = a[:, None] * p + b[:, None] * g
            assert float(new.norm()) * 0.05**0.5 <= 1 - ball.MARGIN + 1e-9
            # against the gradient is outwards here; a move inwards must really move
            a, b = ball.point_step(gram[0], -gram[1], gram[2], torch.tensor([eta], dtype=torch.float64), 0.05)
            assert float((a[:, None] * p - b[:, None] * g).norm()) <= float(p.norm()) * (1 + 1e-9)


@given(vectors(), vectors(), st.floats(0, 0.9), st.floats(0, 0.9), st.floats(1e-4, 2), st.sampled_from(RADII))
@settings(max_examples=150)
def test_the_point_step_is_equation_9(p: Tensor, g: Tensor, share: float, size: float, eta: float, r: float) -> None:
    p, g = inside(p, share, r), inside(g, size, r)
    manifold = geoopt_ball(r)
    step = manifold.mobius_scalar_mul(torch.tensor(-eta, dtype=torch.float64), g, project=False)
    expected = manifold.mobius_add(p, step, project=False)
    a, b = ball.point_step(
        (p * p).sum(-1), (p * g).sum(-1), (g * g).sum(-1), torch.full((3,), eta, dtype=torch.float64), r
    )
    within = expected.norm(dim=-1) < (1 - 2 * ball.MARGIN) * r**-0.5
    ours = a[:, None] * p + b[:, None] * g
    assert torch.allclose(ours[within], expected[within], rtol=0, atol=1e-10 * r**-0.5)


@pytest.mark.parametrize("y", [1e-30, 1e-9, 1e-4, 9.9e-4, 1.01e-3, 0.1, 1.0, 9.0])
def test_ratios_of_tanh_on_both_sides_of_their_series(y: float) -> None:
    """T = tanh(z)/z, S = 1/cosh²(z) and W = (T − S)/z², y = z²: all slopes of the ball's map are made of them."""
    found = ball._tanh_ratio(torch.tensor(y, dtype=torch.float64))
    with mpmath.workdps(80):
        z = mpmath.sqrt(mpmath.mpf(y))
        t, s = mpmath.tanh(z) / z, mpmath.sech(z) ** 2
        expected = [float(t), float(s), float((t - s) / z**2)]
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-12)
