"""Applied models that are moved, cast, put on the meta device and materialized, in both modes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin.cluster.epc import EPC
from tiny_hosts import (
    BINARY_LAYERS,
    IrConv,
    ScaledConv,
    TinyNet,
    clusters,
    latents,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import F64, applied, each_mode, moved, output, saved, steps

OPTIONS = {"relative": True, "point_momentum": 0.5}


def started(mode: str, **options: Any) -> TinyNet:
    net = applied(ScaledConv, mode=mode, **{**OPTIONS, **options})
    train(net, SGD(net.parameters(), lr=0.3), 2)
    return net


def tensors_of(epc: EPC) -> list[torch.Tensor]:
    return [epc.parameter, *(buffer for buffer in epc.buffers() if buffer is not None)]


# -- cast --------------------------------------------------------------------------------------------------------------


@each_mode
def test_a_model_in_double_precision_trains_on_as_one_that_always_was(mode: str) -> None:
    net = applied(ScaledConv, mode=mode, **OPTIONS).double()
    reference = hbnn_plugin.apply(tiny_net(ScaledConv).double(), mode=mode, **OPTIONS)
    for one in (net, reference):
        train(one, SGD(one.parameters(), lr=0.3), 3)
        assert {t.dtype for epc in clusters(one).values() for t in tensors_of(epc) if t.is_floating_point()} == {F64}
    for name in BINARY_LAYERS:
        assert torch.allclose(points(net)[name], points(reference)[name], rtol=1e-3, atol=1e-6)
        assert torch.allclose(latents(net)[name], latents(reference)[name], rtol=1e-3, atol=1e-5)
    assert steps(net) == [3, 3]


@each_mode
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half], ids=["bf16", "fp16"])
def test_half_precision_and_back_keeps_the_points(cast: Callable[[nn.Module], nn.Module], mode: str) -> None:
    """Weights and latents are rounded, as the host's own are; points never."""
    net = started(mode)
    kept = points(net)
    cast(net)
    for epc in clusters(net).values():
        assert epc.parameter.dtype in (torch.bfloat16, torch.float16)
        assert {b.dtype for b in (epc.point, epc.scale, epc.momentum, epc.mean_square)} == {torch.float32}
    assert moved(net, kept) == []
    assert all(v.dtype == epc.parameter.dtype for v, epc in zip(latents(net).values(), clusters(net).values()))
    rounded = latents(net)
    net.float()
    assert moved(net, kept) == []
    assert all(torch.equal(v, rounded[name].float()) for name, v in latents(net).items())
    train(net, SGD(net.parameters(), lr=0.3), 1)
    assert moved(net, kept) == list(BINARY_LAYERS)


@each_mode
def test_nothing_of_a_cluster_stays_behind_when_it_is_moved(mode: str) -> None:
    net = started(mode).to("meta")
    for epc in clusters(net).values():
        held = {name: value for name, value in vars(epc).items() if isinstance(value, torch.Tensor)}
        assert [name for name, value in held.items() if not value.is_meta] == ["flip_reference"]  # which is the CPU's
        assert all(buffer.is_meta for buffer in epc.buffers())


# -- the meta device ---------------------------------------------------------------------------------------------------


def materialized(net: TinyNet, way: str, checkpoint: dict[str, torch.Tensor]) -> TinyNet:
    hollow = copy.deepcopy(net).to("meta")
    assert all(t.is_meta for epc in clusters(hollow).values() for t in tensors_of(epc))
    if way == "to_empty":
        hollow.to_empty(device="cpu").load_state_dict(checkpoint)
    else:
        hollow.load_state_dict(checkpoint, assign=True)
    assert not any(t.is_meta for t in hollow.state_dict().values())
    return hollow.train()


each_way = pytest.mark.parametrize("way", ["to_empty", "assign"])


@each_mode
@each_way
def test_a_materialized_model_trains_on_to_the_bit(way: str, mode: str) -> None:
    net = started(mode)
    other = materialized(net, way, saved(net.state_dict()))
    assert same_state(state(other), state(net))
    assert torch.equal(output(other), output(net))
    for one in (net, other):
        train(one.train(), SGD(one.parameters(), lr=0.3, momentum=0.9), 2, first=2)
    assert same_state(state(other), state(net))
    assert steps(other) == [4, 4]


@each_mode
@each_way
@pytest.mark.parametrize("theirs", ["plain", "the other mode"])
def test_a_model_on_the_meta_device_takes_every_checkpoint(theirs: str, way: str, mode: str) -> None:
    other = (
        tiny_net(ScaledConv, seed=4)
        if theirs == "plain"
        else started("inplace" if mode == "parametrize" else "parametrize", relative=False)
    )
    net = materialized(started(mode, relative=False), way, saved(other.state_dict()))
    torch.testing.assert_close(output(net), output(other), rtol=1e-4, atol=1e-5)
    assert steps(net) == ([0, 0] if theirs == "plain" else [2, 2])
    before = points(net)
    train(net.train(), SGD(net.parameters(), lr=0.3), 1)
    assert moved(net, before) == list(BINARY_LAYERS)


@each_mode
def test_a_host_built_on_the_meta_device_is_applied_to_after_it_is_materialized(mode: str) -> None:
    with torch.device("meta"):
        net = TinyNet(IrConv)
    with pytest.raises(ValueError, match=r"conv1 .* is on the meta device; materialize and initialize the model first"):
        hbnn_plugin.apply(net, mode=mode)
    net.to_empty(device="cpu").load_state_dict(tiny_net(IrConv).state_dict())
    hbnn_plugin.apply(net, mode=mode)
    reference = applied(IrConv, mode=mode)
    for one in (net, reference):
        train(one, SGD(one.parameters(), lr=0.3), 2)
    assert same_state(state(net), state(reference))


@each_mode
def test_loading_into_the_meta_device_without_assigning_is_told_by_torch(mode: str) -> None:
    net = started(mode).to("meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.load_state_dict(tiny_net(ScaledConv).state_dict())
    assert any("assign=True" in str(w.message) for w in caught)
