"""Checkpoints in every direction: plain into applied, applied into applied, applied into plain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Adam

import hbnn_plugin
from hbnn_plugin import by_name
from hbnn_plugin.host.bits import pack_bits
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
    IrConv,
    ScaledConv,
    SimanConv,
    TinyNet,
    clusters,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import (
    GEOMETRIES,
    Doubled,
    applied,
    each_geometry,
    each_host,
    each_mode,
    moved,
    output,
    saved,
    trained,
)


def binary_now(net: TinyNet) -> dict[str, Tensor]:
    return {name: net.get_submodule(name).binary_weight().detach().flatten() > 0 for name in BINARY_LAYERS}


# -- plain checkpoint into an applied model --------


@each_geometry
@each_mode
@pytest.mark.parametrize("host", [IrConv, SimanConv, ScaledConv, HardBinaryConv], ids=lambda h: h.__name__)
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_a_plain_checkpoint_loads_strictly(host: Any, mode: str, options: dict[str, Any]) -> None:
    plain = tiny_net(host, seed=5)
    train(plain, SGD(plain.parameters(), lr=0.1), 2)
    net = trained(host, mode=mode, **options)
    assert any(net_flips for net_flips in hbnn_plugin.flip_ratio(net).values())
    result = net.load_state_dict(saved(plain.state_dict()))
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    if host not in (ScaledConv, HardBinaryConv) or options["relative"] or options["space"] == "ball":
        torch.testing.assert_close(output(net), output(plain), rtol=1e-4, atol=1e-5)
    fresh = hbnn_plugin.apply(plain, mode=mode, **options)
    assert same_state(state(net), state(fresh)), "not what apply on the loaded host would give"
    assert hbnn_plugin.flip_ratio(net).total == 0
    bits = binary_now(net)
    for name, epc in clusters(net).items():
        assert torch.equal(epc.flip_reference, pack_bits(bits[name]))


def test_a_plain_checkpoint_loads_without_touching_the_dict() -> None:
    checkpoint = tiny_net(seed=5).state_dict()
    keys = list(checkpoint)
    applied().load_state_dict(checkpoint)
    assert list(checkpoint) == keys


def test_checkpoints_through_wrappers_and_parts() -> None:
    plain = tiny_net(seed=5)
    wrapped = nn.Sequential(applied())
    wrapped.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()})
    torch.testing.assert_close(output(wrapped), output(plain), rtol=1e-4, atol=1e-5)
    net = applied()
    net.conv1.load_state_dict(plain.conv1.state_dict())
    torch.testing.assert_close(net.conv1.weight, plain.conv1.weight, rtol=1e-5, atol=1e-6)
    copied = copy.deepcopy(applied())
    copied.load_state_dict(plain.state_dict())
    torch.testing.assert_close(output(copied), output(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_a_plain_checkpoint_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    ours, theirs = dtypes
    net = applied(dtype=ours)
    plain = tiny_net(seed=5, dtype=theirs)
    net.load_state_dict(plain.state_dict())
    torch.testing.assert_close(net.conv1.weight, plain.conv1.weight.to(ours), rtol=1e-5, atol=1e-7)
    if theirs != torch.bfloat16:
        torch.testing.assert_close(output(net), output(plain).to(ours), rtol=1e-4, atol=1e-5)
    assert {t.dtype for t in (net.conv1.weight, clusters(net)["conv1"].point)} == {ours}


# -- applied checkpoints --------


@each_mode
@pytest.mark.parametrize("assign", [False, True])
def test_points_of_a_checkpoint_in_half_precision_are_float32(assign: bool, mode: str) -> None:
    net = trained(mode=mode)
    halves = {k: t.half() if t.is_floating_point() else t for k, t in net.state_dict().items()}
    other = applied(mode=mode)
    other.load_state_dict(halves, assign=assign)
    for name, epc in clusters(other).items():
        assert epc.point.dtype == torch.float32
        assert epc.parameter.dtype == (torch.float16 if assign else torch.float32)
        torch.testing.assert_close(epc.point, clusters(net)[name].point, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        *GEOMETRIES,
        {"point_momentum": 0.9},
        {"rule": "riemannian-adam"},
        {"rule": "mobius"},
        {"start": 0.5, "relative": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_an_applied_checkpoint_round_trip_is_exact(options: dict[str, Any]) -> None:
    net = trained(**options)
    other = applied(seed=1, **options)
    other.load_state_dict(saved(net.state_dict()))
    assert same_state(state(net), state(other))
    assert torch.equal(output(net), output(other))
    assert hbnn_plugin.flip_ratio(net).flips == hbnn_plugin.flip_ratio(other).flips
    assert any(hbnn_plugin.flip_ratio(other).flips.values())
    with_momentum = options.get("space") != "sphere" and options.get("rule") != "mobius"
    assert all(
        (epc.momentum is not None and bool(epc.momentum.any())) is with_momentum for epc in clusters(other).values()
    )


def test_loading_by_assignment() -> None:
    net = trained()
    other = applied(seed=1)
    other.load_state_dict(state(net), assign=True)
    assert torch.equal(output(net), output(other))
    before = points(other)
    train(other.train(), SGD(other.parameters(), lr=0.1), 1)
    assert not any(torch.equal(before[name], p) for name, p in points(other).items())


@pytest.mark.parametrize("optimizer_class", [SGD, Adam])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "alternating", "per": "layer"}, {"space": "sphere", "point_momentum": 0.5}],
    ids=["default", "alternating", "sphere"],
)
def test_training_resumes_to_the_bit(options: dict[str, Any], optimizer_class: type[SGD | Adam]) -> None:
    settings = {"lr": 0.05, "momentum": 0.9} if optimizer_class is SGD else {"lr": 0.05}
    whole = applied(**options)
    train(whole, optimizer_class(whole.parameters(), **settings), 5)
    net = applied(**options)
    optimizer = optimizer_class(net.parameters(), **settings)
    train(net, optimizer, 3)
    checkpoint = saved({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    anew = applied(seed=8, **options)
    optimizer = optimizer_class(anew.parameters(), **settings)
    anew.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(anew, optimizer, 2, first=3)
    assert same_state(state(anew), state(whole))


# -- an applied checkpoint into a plain model --------


@each_geometry
@each_host
def test_plain_state_dict_loads_strictly_into_a_plain_model(host: Any, options: dict[str, Any]) -> None:
    net = trained(host, **options)
    checkpoint = saved(net.state_dict())
    before = {key: value.clone() for key, value in checkpoint.items()}
    plain = tiny_net(host, seed=7)
    plain.load_state_dict(hbnn_plugin.plain_state_dict(checkpoint))
    assert torch.equal(output(plain), output(net))
    assert same_state(checkpoint, before)
    weights = [p for p in plain.conv1.parameters() if p.ndim > 1]
    assert weights[0].shape == next(p for p in tiny_net(host).conv1.parameters() if p.ndim > 1).shape


def test_plain_state_dict_passes_plain_and_foreign_entries() -> None:
    plain = tiny_net().state_dict()
    assert same_state(dict(hbnn_plugin.plain_state_dict(plain)), plain)
    net = trained()
    parametrize.register_parametrization(net.fc, "weight", Doubled())
    keys = set(hbnn_plugin.plain_state_dict(net.state_dict()))
    assert keys == (set(plain) - {"fc.weight"}) | {"fc.parametrizations.weight.original"}


def test_plain_state_dict_keeps_the_versions_that_modules_load_by() -> None:
    net = trained()
    loaded = hbnn_plugin.plain_state_dict(net.state_dict())
    assert loaded._metadata["bn1"] == {"version": 2}


@each_mode
@pytest.mark.parametrize(("theirs", "ours"), [("spectral", "riemannian"), ("mobius", "spectral")])
def test_other_rules_do_not_matter_to_a_checkpoint(theirs: str, ours: str, mode: str) -> None:
    """Nor whether they keep a momentum."""
    net, other = applied(rule=ours, point_lr=0.3, order="alternating", mode=mode), trained(rule=theirs, mode=mode)
    net.load_state_dict(other.state_dict())
    assert clusters(net)["conv1"].settings.rule == ours
    assert torch.equal(output(net), output(other))
    momentum = clusters(net)["conv1"].momentum
    assert (momentum is None) is (ours == "riemannian")
    assert momentum is None or not momentum.any()
    before = points(net)
    train(net, SGD(net.parameters(), lr=0.1), 1)
    assert moved(net, before) == ["conv1", "conv2"]


def test_partly_applied_models_take_plain_checkpoints() -> None:
    net = hbnn_plugin.apply(tiny_net(), where=by_name("conv2"))
    plain = tiny_net(seed=5)
    net.load_state_dict(plain.state_dict())
    torch.testing.assert_close(output(net), output(plain), rtol=1e-4, atol=1e-5)
