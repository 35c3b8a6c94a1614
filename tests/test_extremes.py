"""Numbers at the end of their range: overflow, the ball's edge, the sphere's antipode, zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hbnn_plugin
from hbnn_plugin import exp_map
from hbnn_plugin.cluster.epc import find
from tiny_hosts import tiny_net
from training_helpers import one_step


def test_a_gradient_whose_square_overflows_leaves_the_points_finite() -> None:
    for options in ({}, {"space": "sphere"}, {"rule": "riemannian"}):
        model = hbnn_plugin.apply(tiny_net(), **options)  # type: ignore[arg-type]
        one_step(model, torch.optim.SGD(model.parameters(), lr=1e-25), 1e20)
        for layer in (model.conv1, model.conv2):
            assert bool(find(layer)["weight"].point.isfinite().all())


def test_float32_holds_near_the_edge_against_the_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, 500, generator=generator)
    for reach, tolerance in ((0.9, 1e-5), (0.99, 1e-4), (0.999, 1e-3)):
        p = p / p.norm(dim=1, keepdim=True) * reach / 0.05**0.5
        v = -0.02 * p + 1e-4 * torch.randn(8, 500, generator=generator)
        exact = exp_map(p.double(), v.double(), 0.05)
        error = (exp_map(p, v, 0.05).double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(error.max()) < tolerance, reach


def test_the_antipode_of_a_point_on_the_sphere_reads_back() -> None:
    model = hbnn_plugin.apply(tiny_net(), space="sphere")
    for angle in (3.0, 3.14, 3.1415, torch.pi):
        p = find(model.conv1)["weight"].point
        tangent = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        tangent -= (tangent * p).sum((1, 2, 3), keepdim=True) * p
        tangent /= tangent.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        target = torch.cos(torch.tensor(angle)) * p + torch.sin(torch.tensor(angle)) * tangent
        model.conv1.weight = target
        assert torch.allclose(model.conv1.weight, target, atol=5e-4)
        assert float(find(model.conv1)["weight"].parameter.detach().flatten(1).norm(dim=1).max()) < 3.2


def test_a_zero_filter_has_no_place_on_the_sphere_wherever_it_comes_from() -> None:
    model = hbnn_plugin.apply(tiny_net(), space="sphere")
    weight = model.conv1.weight.detach().clone()
    weight[2] = 0
    with pytest.raises(ValueError, match=r"conv1: the weight is zero at 1 point\(s\)"):
        model.conv1.weight = weight
    plain = tiny_net()
    with torch.no_grad():
        plain.conv1.weight[2] = 0
    with pytest.raises(ValueError, match="conv1: the weight is zero"):
        model.load_state_dict(plain.state_dict())


def test_huge_weights_keep_their_direction() -> None:
    model = tiny_net()
    direction = model.conv1.weight.detach().clone()
    with torch.no_grad():
        model.conv1.weight.mul_(1e22)
    with pytest.warns(UserWarning, match="start at the edge"):
        hbnn_plugin.apply(model)
    mapped = model.conv1.weight.detach()
    assert torch.equal(mapped > 0, direction > 0)
    assert torch.nn.functional.cosine_similarity(mapped.flatten(1), direction.flatten(1)).min() > 0.9999


def test_a_decay_beyond_one_stops_at_the_origin() -> None:
    model = hbnn_plugin.apply(tiny_net(), point_decay=50.0)
    epc = find(model.conv1)["weight"]
    epc.point.fill_(0.1)
    one_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.0)
    assert float(epc.point.abs().max()) == 0


def test_a_step_far_too_large_stays_inside_the_ball_in_half_precision() -> None:
    for cast in (nn.Module.bfloat16, nn.Module.half):
        model = hbnn_plugin.apply(tiny_net())
        cast(model)
        one_step(model, torch.optim.SGD(model.parameters(), lr=1e3))
        assert 0.9 < float(find(model.conv1)["weight"].reach().max()) < 1
