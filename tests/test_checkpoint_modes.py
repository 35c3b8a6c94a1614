"""Checkpoints between the two modes: an applied model loads those of the other mode as its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import hbnn_plugin
from inplace_nets import CURVED, agree, smooth
from tiny_hosts import HardBinaryConv, IrConv, SmoothConv, TinyNet, clusters, latents, points, same_state, train
from training_helpers import F64, applied, each_geometry, output, saved, trained

each_way = pytest.mark.parametrize(("ours", "theirs"), [("parametrize", "inplace"), ("inplace", "parametrize")])


@each_way
@each_geometry
@pytest.mark.parametrize("conv", [IrConv, HardBinaryConv], ids=lambda c: c.__name__)
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_a_checkpoint_of_the_other_mode_loads_strictly(
    conv: Any, options: dict[str, Any], ours: str, theirs: str
) -> None:
    other = applied(conv, seed=3, mode=theirs, point_momentum=0.5, **options)
    train(other, SGD(other.parameters(), lr=0.5), 3)
    net = applied(conv, mode=ours, point_momentum=0.5, **options)
    keys, checkpoint = list(net.state_dict()), saved(other.state_dict())
    before = {key: value.clone() for key, value in checkpoint.items()}
    result = net.load_state_dict(checkpoint)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(net.state_dict()) == keys
    assert same_state(checkpoint, before), "the caller's dict was changed"
    assert torch.equal(output(net), output(other))
    for name, epc in clusters(other).items():
        found = clusters(net)[name]
        assert torch.equal(latents(net)[name], latents(other)[name])
        for key in ("point", "momentum", "scale", "mean_square", "steps", "flip_reference"):
            mine, expected = getattr(found, key), getattr(epc, key)
            assert mine is expected is None or torch.equal(mine, expected), key
        assert int(found.steps) == 3 and found.point.any()
    assert dict(hbnn_plugin.flip_ratio(net)) == dict(hbnn_plugin.flip_ratio(other))
    assert hbnn_plugin.flip_ratio(net).total > 0


class WithoutBias(SmoothConv):
    """Under a parametrization a layer's bias comes before its weight, and optimizers number what they hold."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, bias=False, **options)


@each_way
@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_a_training_goes_on_in_the_other_mode_with_the_optimizers_state(ours: str, theirs: str) -> None:
    def build(mode: str, seed: int = 0) -> TinyNet:
        return applied(WithoutBias, seed, F64, mode=mode, point_momentum=0.5, **CURVED)

    def optimizer_of(net: TinyNet) -> SGD:
        return SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)

    whole = build(ours)
    train(whole, optimizer_of(whole), 4)
    first, second = build(theirs), build(ours, seed=5)
    before, after = optimizer_of(first), optimizer_of(second)
    train(first, before, 2)
    second.load_state_dict(saved(first.state_dict()))
    after.load_state_dict(saved(before.state_dict()))
    train(second, after, 2, first=2)
    assert agree(second, whole)
    assert not agree(first, whole)


def test_what_a_host_did_to_its_weight_after_the_last_step_is_taken_along() -> None:
    net, other = smooth("parametrize"), smooth("inplace", seed=3)
    train(other, SGD(other.parameters(), lr=0.3), 2)
    other.conv1.weight.data[1].clamp_(-0.02, 0.02)  # as a trainer does between steps
    untouched = latents(other)
    net.load_state_dict(saved(other.state_dict()))
    assert torch.equal(latents(net)["conv2"], untouched["conv2"])
    assert not torch.allclose(latents(net)["conv1"][1], untouched["conv1"][1])
    torch.testing.assert_close(latents(net)["conv1"][[0, 2, 3, 4]], untouched["conv1"][[0, 2, 3, 4]])
    torch.testing.assert_close(net.conv1.weight, other.conv1.weight)
    for model in (net, other):
        train(model, SGD(model.parameters(), lr=0.3), 2, first=2)
    assert agree(net, other)


@each_way
def test_parts_wrapped_models_and_the_layer_itself(ours: str, theirs: str) -> None:
    other = trained(seed=3, mode=theirs)
    net = applied(mode=ours)
    nn.Sequential(net).load_state_dict({f"0.{key}": value for key, value in other.state_dict().items()})
    assert torch.equal(output(net), output(other))
    net = applied(mode=ours)
    net.conv1.load_state_dict(other.conv1.state_dict())
    assert torch.equal(net.conv1.weight, other.conv1.weight)
    assert torch.equal(points(net)["conv1"], points(other)["conv1"])
    assert not torch.equal(net.conv2.weight, other.conv2.weight)
