"""Packed files that do not fit a model: every difference in one error, the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbnn_plugin.export import load_packed, save_packed
from packed_files import refuses
from tiny_hosts import (
    IrConv,
    ScaledConv,
    TinyNet,
    same_state,
    state,
    tiny_net,
)
from training_helpers import applied, each_mode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_packed(tiny_net(ScaledConv), tmp_path / "file")
    return tmp_path / "file"


def test_every_difference_is_listed(path: Path) -> None:
    model = tiny_net(ScaledConv)
    model.conv1 = ScaledConv(4, 5, 5, padding=2)
    model.bn1 = nn.Identity()
    model.bn2 = nn.InstanceNorm2d(6, affine=True)
    model.extra = nn.Linear(2, 2)
    model.fc = nn.Linear(6, 4, dtype=torch.float64)
    model.conv2 = IrConv(5, 6, 3, stride=2, padding=1)
    text = refuses(path, model, "does not fit TinyNet, which stays as it was:")
    lines = {line.strip() for line in text.splitlines()[1:]}
    assert lines == {
        "extra.weight: in the model, not in the file",
        "extra.bias: in the model, not in the file",
        *(f"bn1.{n}: in the file, not in the model" for n in ("weight", "bias", "running_mean", "running_var")),
        *(f"bn{i}.num_batches_tracked: in the file, not in the model" for i in (1, 2)),
        *(f"bn2.{n}: in the file, not in the model" for n in ("running_mean", "running_var")),
        "conv1.weight: float32 (5, 4, 3, 3) in the file, float32 (5, 4, 5, 5) in the model",
        "conv1: a weight of logical shape (5, 4, 3, 3) in the file, (5, 4, 5, 5) in the model",
        "conv2: ScaledConv in the file, IrConv in the model",
        "fc.weight: float32 (4, 6) in the file, float64 (4, 6) in the model",
        "fc.bias: float32 (4,) in the file, float64 (4,) in the model",
    }


class Dense(nn.Conv2d):
    """Called as a host's layer is, and convolving with nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=1) @ self.weight.mean()


def test_layers_that_are_missing_or_do_not_convolve(path: Path) -> None:
    model = tiny_net(ScaledConv)
    Dense.__name__ = "ScaledConv"
    model.conv1, model.conv2 = Dense(4, 5, 3, padding=1), nn.Identity()
    text = refuses(path, model, "conv1: on a small input the model's layer runs no convolution")
    assert "conv2: a binary layer in the file; the model has no such layer with a weight" in text


def test_a_model_without_values(path: Path) -> None:
    with torch.device("meta"):
        model = TinyNet(ScaledConv)
    with pytest.raises(ValueError, match=r"fc\.bias: the model has no values there yet; initialize it first"):
        load_packed(path, model)


def test_a_forward_on_the_instance(path: Path) -> None:
    model = tiny_net(ScaledConv)
    model.conv1.forward = model.conv1.forward
    with pytest.raises(ValueError, match="conv1: something has put another forward on this instance"):
        load_packed(path, model)


def test_ties_of_the_model_that_the_file_does_not_have(path: Path, tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.bn2.bias = nn.Parameter(net.bn2.weight + 1)
    save_packed(net, tmp_path / "other")
    model = tiny_net(ScaledConv)
    model.bn2.bias = model.bn2.weight
    refuses(tmp_path / "other", model, "bn2.bias: the same tensor as bn2.weight in the model, another in the file")


@each_mode
def test_applied_models_are_refused(mode: str, path: Path) -> None:
    refuses(path, applied(ScaledConv, mode=mode), "hbnn_plugin.apply was called on conv1, conv2: load it into a new")


def test_a_models_own_hook_that_raises_half_way(path: Path) -> None:
    model = tiny_net(ScaledConv, seed=1)

    def hook(*_: Any) -> None:
        raise RuntimeError("not mine")

    model.fc._register_load_state_dict_pre_hook(hook)
    before = state(model)
    with pytest.raises(RuntimeError, match="not mine"):
        load_packed(path, model)
    assert same_state(state(model), before)
