"""Checkpoints that do not fit an applied model are refused whole, with every difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin import by_name
from tiny_hosts import BINARY_LAYERS, HardBinaryConv, IrConv, TinyNet, tiny_net
from training_helpers import applied, each_mode, each_pair, output, refused, saved, trained

# -- other clusters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"radius": 0.1}, [r"conv1: radius is 0\.1 in the checkpoint, 0\.05 in the model", r"conv2: radius is 0\.1"]),
        ({"per": "layer"}, ["conv1: per is 'layer' in the checkpoint, 'filter' in the model", "conv2: per is 'layer'"]),
        (
            {"space": "sphere"},
            ["conv1: space is 'sphere'.*'ball'", r"conv1: radius is 1\.0", "conv2: space", "conv2: radius"],
        ),
        ({"relative": True}, ["conv1: relative is True in the checkpoint, False in the model", "conv2: relative"]),
        (
            {"space": "sphere", "per": "layer", "radius": 0.3, "relative": True},
            [f"{layer}: {key} is" for layer in BINARY_LAYERS for key in ("space", "radius", "per", "relative")],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("strict", [True, False])
@each_pair
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_a_checkpoint_of_other_clusters_is_refused_whole(
    ours: str, theirs: str, options: dict[str, Any], fragments: list[str], strict: bool
) -> None:
    checkpoint = saved(trained(seed=4, mode=theirs, **options).state_dict())
    net = trained(mode=ours)
    message = refused(net, checkpoint, *fragments, strict=strict)
    assert "plain_state_dict(checkpoint) has the weights" in message
    refused(nn.Sequential(net), {f"0.{k}": v for k, v in checkpoint.items()}, *fragments, strict=strict)
    net.load_state_dict(hbnn_plugin.plain_state_dict(checkpoint))


def test_a_part_of_a_model_refuses_the_checkpoint_of_other_clusters_too() -> None:
    """A backbone is often loaded by itself."""
    backbone = nn.Sequential(tiny_net())
    model = hbnn_plugin.apply(nn.ModuleDict({"backbone": backbone, "head": nn.Linear(4, 2)}))
    other = nn.Sequential(trained(seed=4, radius=0.1))
    refused(model["backbone"], other.state_dict(), r"conv2: radius is 0\.1")


@each_pair
def test_other_layers_are_refused_and_named(ours: str, theirs: str) -> None:
    some, every = by_name("conv2"), by_name("conv")
    checkpoints = {
        where: saved(trained(seed=4, mode=theirs, where=where, per="layer").state_dict()) for where in (some, every)
    }
    net = trained(mode=ours, where=every)
    refused(
        net,
        checkpoints[some],
        "conv1: its weight is plain in the checkpoint, has a cluster in the model",
        "conv2: per is 'layer'",
    )
    net = trained(mode=ours, where=some)
    refused(net, checkpoints[every], "conv1: has a cluster in the checkpoint, none in the model", "conv2: per is")
    for checkpoint in checkpoints.values():
        plain = tiny_net()
        plain.load_state_dict(hbnn_plugin.plain_state_dict(checkpoint))
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(output(net), output(plain), rtol=1e-4, atol=1e-5)


@each_mode
def test_a_layer_that_is_there_under_two_names_is_no_stranger(mode: str) -> None:
    def twice() -> nn.Sequential:
        torch.manual_seed(0)
        layer = IrConv(3, 3, 3, padding=1)
        return hbnn_plugin.apply(nn.Sequential(layer, nn.Tanh(), layer), mode=mode)

    checkpoint = saved(twice().state_dict())
    assert {"0", "2"} == {key.split(".")[0] for key in checkpoint}
    twice().load_state_dict(checkpoint)


# -- other shapes ------------------------------------------------------------------------------------------------------


class Wider(TinyNet):
    def __init__(self) -> None:
        super().__init__(IrConv)
        self.conv1, self.conv2 = IrConv(4, 7, 3, padding=1), IrConv(7, 6, 3, padding=1)


@each_pair
def test_applied_checkpoints_of_other_shapes(ours: str, theirs: str) -> None:
    checkpoint = saved(hbnn_plugin.apply(Wider(), mode=theirs, radius=0.1).state_dict())
    refused(
        trained(mode=ours),
        checkpoint,
        r"conv1: radius is 0\.1 in",
        r"conv1: shape is \[7, 4, 3, 3\] in the checkpoint, \[5, 4, 3, 3\] in the model",
        r"conv2: radius is 0\.1 in",
        r"conv2: shape is \[6, 7, 3, 3\] in the checkpoint, \[6, 5, 3, 3\] in the model",
    )


@each_mode
def test_plain_checkpoints_of_other_shapes(mode: str) -> None:
    message = refused(
        trained(mode=mode),
        Wider().state_dict(),
        r"conv1: its weight has the shape \(7, 4, 3, 3\) in the checkpoint, \(5, 4, 3, 3\) in the model",
        r"conv2: its weight has the shape \(6, 7, 3, 3\)",
    )
    assert "plain_state_dict" not in message


@pytest.mark.filterwarnings("ignore:.*could not be seen")
def test_flat_weights_of_other_logical_shapes() -> None:
    class Renamed(HardBinaryConv):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.shape = (self.shape[1], self.shape[0], *self.shape[2:])

        def binary_weight(self) -> Tensor:
            return super().binary_weight().transpose(0, 1)

    refused(
        applied(Renamed),
        trained(HardBinaryConv).state_dict(),
        r"conv1: shape is \[5, 4, 3, 3\] in the checkpoint, \[4, 5, 3, 3\] in the model",
    )


class Unfolded(HardBinaryConv):
    """Keeps its weight in four dimensions."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weights = nn.Parameter(self.weights.detach().reshape(self.shape))


@each_pair
def test_a_flat_weight_is_not_a_four_dimensional_one(ours: str, theirs: str) -> None:
    refused(
        applied(Unfolded, mode=ours),
        trained(HardBinaryConv, mode=theirs).state_dict(),
        r"conv1: its weights has the shape \(180, 1\) in the checkpoint, \(5, 4, 3, 3\) in the model",
    )


@each_mode
def test_a_plain_checkpoint_outside_the_ball_is_told_and_keeps_its_binary_weights(mode: str) -> None:
    net, plain = applied(mode=mode), tiny_net(seed=5)
    with torch.no_grad():
        plain.conv2.weight[1] *= 1e3
    bits = plain.conv2.binary_weight().detach() > 0

    with pytest.warns(UserWarning, match=r"conv2.*\b1 of 6 point.*its direction is kept"):
        net.load_state_dict(plain.state_dict())
    assert torch.equal(net.conv2.binary_weight().detach() > 0, bits)
    norms = net.conv2.weight.detach().flatten(1).norm(dim=1)
    assert 4.4 < float(norms[1]) < 0.05**-0.5
    torch.testing.assert_close(norms[2:], plain.conv2.weight.detach().flatten(1).norm(dim=1)[2:])


def test_a_plain_checkpoint_with_nan_is_refused_before_anything_is_loaded() -> None:
    model, plain = hbnn_plugin.apply(tiny_net()), tiny_net(seed=1)
    with torch.no_grad():
        plain.conv2.weight[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="conv2: its weight in the checkpoint holds non-finite"):
        model.load_state_dict(plain.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
