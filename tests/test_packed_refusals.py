"""What save_packed refuses, and names: no file is left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hbnn_plugin
from hbnn_plugin import by_name
from hbnn_plugin.export import load_packed, save_packed
from packed_files import refuses
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
    HostConv,
    IrConv,
    ScaledConv,
    SimanZeroOneConv,
    SmoothConv,
    same_state,
    state,
    ste_sign,
    tiny_net,
)
from training_helpers import Doubled, applied


def not_saved(model: nn.Module, tmp_path: Path, message: str, where: Any = None) -> str:
    before = state(model) if not hasattr(model, "note") else {}
    with pytest.raises(ValueError, match=message) as caught:
        save_packed(model, tmp_path / "never", where)
    assert not list(tmp_path.iterdir())
    assert not before or same_state(state(model), before)
    return str(caught.value)


@pytest.mark.parametrize("host", [SmoothConv, SimanZeroOneConv])
@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_layers_that_are_not_binary_are_named(host: Any, tmp_path: Path) -> None:
    for net in (tiny_net(host), applied(host)):
        text = not_saved(net, tmp_path, "not binary in evaluation mode:\n  conv1: 5 of 5 filters are not ±scale")
        assert re.search(r"conv2: 6 of 6 filters are not ±scale: in filter 0 \|w\| is \S+ to \S+\n", text)
    not_saved(tiny_net(), tmp_path, "fc: 4 of 4 filters are not ±scale", by_name("^fc$"))


class NearlyBinaryConv(HostConv):
    """+0.9 and −0.92: apart by two percent, which in half precision is many roundings."""

    def binary_weight(self) -> Tensor:
        return torch.where(self.weight > 0, 0.9, -0.92).to(self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_values_that_are_not_of_one_magnitude_are_refused_in_half_precision_too(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    not_saved(tiny_net(NearlyBinaryConv, dtype=dtype), tmp_path, "conv1: 5 of 5 filters are not ±scale")


@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_a_real_layer_with_a_cluster_is_named(tmp_path: Path) -> None:
    net = hbnn_plugin.apply(tiny_net(), where=by_name("fc"))
    not_saved(net, tmp_path, "fc: 4 of 4 filters are not ±scale")
    save_packed(net, tmp_path / "file", by_name("conv"))


def test_no_module(tmp_path: Path) -> None:
    for call in (save_packed, load_packed):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, not (str|PosixPath)"):
            call(str(tmp_path), tmp_path)  # type: ignore[arg-type]


def test_one_weight_off_is_not_binary(tmp_path: Path) -> None:
    class Off(IrConv):
        def binary_weight(self) -> Tensor:
            w = super().binary_weight().clone()
            w[3, 0, 0, 0] *= 1 + 1e-5
            return w

    not_saved(tiny_net(Off), tmp_path, r"conv1: 1 of 5 filters are not ±scale: in filter 3 \|w\| is 1 to 1\.00001")


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.conv2.weight.data[0, 0, 0, 0] = torch.nan
    not_saved(net, tmp_path, r"conv2: what it convolves with holds 45 non-finite value\(s\)")


def test_models_without_a_binary_layer(tmp_path: Path) -> None:
    not_saved(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Embedding(3, 2)), tmp_path, "Sequential has no binary layer")
    for weight in (torch.zeros(4, 3), torch.ones(4, 3)):  # constants are no binary weights
        linear = nn.Linear(3, 4)
        linear.weight.data.copy_(weight)
        not_saved(nn.Sequential(linear, nn.Linear(1, 4)), tmp_path, "has no binary layer")


def test_a_layer_that_cannot_be_run(tmp_path: Path) -> None:
    class TwoInputs(IrConv):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    not_saved(TwoInputs(2, 2, 3), tmp_path, "TwoInputs: on a small input its forward runs no convolution")


class ScaledBehind(HostConv):
    """XNOR-Net with its scale behind the convolution."""

    def binary_weight(self) -> Tensor:
        return ste_sign(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.abs().mean((1, 2, 3))[:, None, None]


def test_a_latent_weight_that_matters_otherwise(tmp_path: Path) -> None:
    not_saved(tiny_net(ScaledBehind), tmp_path, "conv1, conv2: with its binary weight alone the layer's output is")


def test_a_binary_weight_that_is_used_elsewhere(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.other = nn.Linear(1, 1)
    net.other.weight = net.conv1.weight
    not_saved(net, tmp_path, "cannot be packed:\n  conv1: its weight is also other.weight, which is not binary")


def test_a_shared_weight_that_is_binarized_in_two_ways(tmp_path: Path) -> None:
    net = nn.Sequential(ScaledConv(4, 4, 3), IrConv(4, 4, 3))
    net[1].weight = net[0].weight
    not_saved(net, tmp_path, "0 and 1 share a weight and make different binary weights of it")


def test_somebody_elses_parametrization(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    parametrize.register_parametrization(net.conv1, "weight", Doubled())
    not_saved(net, tmp_path, "conv1: its weight is parametrized; remove that parametrization first")


class Noted(IrConv):
    note = "a sentence"

    def get_extra_state(self) -> str:
        return self.note


def test_states_that_are_no_tensors(tmp_path: Path) -> None:
    net = tiny_net(Noted)
    net.note = ""
    not_saved(net, tmp_path, r"conv1._extra_state \(str\) is no tensor with values")


def test_what_a_file_of_a_flat_host_says(tmp_path: Path) -> None:
    save_packed(tiny_net(HardBinaryConv), tmp_path / "file")
    model = tiny_net(HardBinaryConv)
    model.conv1.weights = nn.Parameter(model.conv1.weights.reshape(-1))
    refuses(tmp_path / "file", model, r"conv1.weights: float32 \(180, 1\) in the file, float32 \(180,\) in the model")
    assert BINARY_LAYERS == ("conv1", "conv2")
