"""Layers of every kind, shape and dtype, and layers that share a weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_class
from hbnn_plugin.cluster.epc import find
from layer_kinds import LAYERS, tied_net
from tiny_hosts import (
    HostConv,
    IrConv,
    RecuConv,
    SimanConv,
    batch,
    clusters,
    loss_of,
    tiny_net,
    train,
)
from training_helpers import each_mode


@each_mode
@pytest.mark.parametrize("host", [IrConv, RecuConv, SimanConv])
def test_tied_weights_share_their_point_train_and_fuse(host: type[HostConv], mode: str) -> None:
    net = tied_net(host)
    net(batch()[0])
    before = net(batch()[0])
    hbnn_plugin.apply(net, mode=mode)
    a, b, other = (net[0][i] for i in (1, 2, 3))
    assert torch.equal(net(batch()[0]), before)
    (of_a,), (of_b,), (of_other,) = (find(layer).values() for layer in (a, b, other))
    assert of_a is of_b is not of_other
    parameter = of_a.parameter
    optimizer = SGD(net.parameters(), lr=1e-3)
    for seed in range(2):
        optimizer.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert torch.equal(a.weight, b.weight)
    assert int(of_a.steps) == 2
    assert all(epc.point.flatten(1).any(1).all() for epc in clusters(net).values())
    assert len(hbnn_plugin.flip_ratio(net)) == 3
    x = batch(5)[0]
    trained = net(x)
    plain = tied_net(host)
    plain(x)
    plain.load_state_dict(hbnn_plugin.plain_state_dict(net.state_dict()))
    assert torch.equal(plain(x), trained)
    twin = hbnn_plugin.fuse(copy.deepcopy(net))
    assert torch.equal(twin(x), trained)
    hbnn_plugin.fuse(net)
    assert a.weight is b.weight is parameter
    assert type(a) is type(b) is host
    assert torch.equal(net(x), trained)


@pytest.mark.parametrize(
    "options", [{}, {"relative": True, "rule": "riemannian"}, {"space": "sphere"}], ids=["ball", "relative", "sphere"]
)
@each_mode
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_has_a_point_for_each_output_unit(kind: str, options: dict[str, Any], mode: str) -> None:
    build, shape, units = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    x = torch.rand(shape) + 0.5
    weight = next(p for p in layer.parameters() if p.ndim > 1)
    w = weight.detach().clone()
    expected = []
    for unit in range(units):
        y = layer(x)
        y = y[:, unit] if y.ndim == 2 else y.movedim(1, 0)[unit]
        (used,) = torch.autograd.grad(y.sum(), weight)
        expected.append(w[used != 0].norm())
    assert sum(e.square() for e in expected) == pytest.approx(float(w.square().sum()), rel=1e-5)
    before, keys, cls = layer(x), list(layer.state_dict()), type(layer)
    hbnn_plugin.apply(layer, where=by_class(cls), mode=mode, **options)
    (epc,) = clusters(layer).values()
    assert epc.point_count == units
    if epc.scale is not None:
        torch.testing.assert_close(epc.scale.flatten(), torch.stack(expected))
        torch.testing.assert_close(layer(x), before)
    optimizer = SGD(layer.parameters(), lr=0.1)
    start = epc.point.clone()
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) * torch.linspace(-1, 1, before.numel()).reshape(before.shape)).sum().backward()
        optimizer.step()
    assert not torch.equal(epc.point, start)
    assert epc.point.isfinite().all()
    trained = layer(x)
    hbnn_plugin.fuse(layer)
    assert torch.equal(layer(x), trained)
    assert list(layer.state_dict()) == keys
    assert type(layer) is cls
    assert next(p for p in layer.parameters() if p.ndim > 1) is weight


@each_mode
@pytest.mark.parametrize("kind", LAYERS)
def test_where_the_map_is_the_identity_every_kind_trains_as_it_does_alone(kind: str, mode: str) -> None:
    build, shape, _ = LAYERS[kind]
    trained = []
    for applied in (False, True):
        torch.manual_seed(0)
        layer = build().double()
        if applied:
            hbnn_plugin.apply(layer, where=by_class(type(layer)), mode=mode, radius=1e-12, rule="fixed")
        optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        for seed in range(3):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        trained.append(layer)
    bare, layer = trained
    hbnn_plugin.fuse(layer)
    for key, value in bare.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-8, atol=1e-10)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_points_are_float32_or_better(dtype: torch.dtype, mode: str) -> None:
    net = hbnn_plugin.apply(tiny_net(dtype=dtype), mode=mode)
    assert {epc.point.dtype for epc in clusters(net).values()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    train(net, SGD(net.parameters(), lr=0.1), 2)
    assert all(epc.point.any() for epc in clusters(net).values())
    assert net.conv1.weight.dtype == dtype
    assert loss_of(net).isfinite()
