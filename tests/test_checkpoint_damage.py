"""Damaged and hostile checkpoints are named, load nothing and run no code."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hbnn_plugin
from tiny_hosts import loss_of, tiny_net
from training_helpers import Trap, applied, each_mode, each_pair, refused, saved, trained


def damaged(state: Tensor) -> dict[str, Any]:
    def of(text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)

    end = int((state == 0).nonzero()[0])
    settings = json.loads(bytes(state[:end].tolist()))
    rest = state[end + 1 :]
    return {
        "cut off in the settings": state[: end // 2],
        "cut off in the flip reference": state[:-1],
        "empty": state[:0],
        "other bytes": torch.full_like(state, 255),
        "another dtype": state.float(),
        "no tensor": "settings",
        "a list": torch.cat([of("[]"), rest]),
        "a number": torch.cat([of("3"), rest]),
        "nested without end": torch.cat([of("[" * 100_000), rest]),
        "no shape": torch.cat([of(json.dumps({k: v for k, v in settings.items() if k != "shape"})), rest]),
        "no radius": torch.cat([of(json.dumps({k: v for k, v in settings.items() if k != "radius"})), rest]),
        "a shape of words": torch.cat([of(json.dumps({**settings, "shape": ["a"]})), rest]),
    }


@pytest.mark.parametrize("how", list(damaged(applied().conv1.parametrizations.weight[0].get_extra_state())))
@each_pair
def test_damaged_settings_are_named(how: str, ours: str, theirs: str) -> None:
    checkpoint = trained(mode=theirs).state_dict()
    (key,) = (key for key in checkpoint if key.startswith("conv2") and key.endswith("_extra_state"))
    checkpoint[key] = damaged(checkpoint[key])[how]
    refused(trained(mode=ours), checkpoint, rf"conv2: its cluster's settings in the checkpoint \({key}\) are damaged")
    if theirs == "parametrize":
        with pytest.raises(ValueError, match=rf"settings in the checkpoint \({key}\) are damaged"):
            hbnn_plugin.plain_state_dict(checkpoint)
    else:  # whose weights stand by themselves
        tiny_net().load_state_dict(hbnn_plugin.plain_state_dict(checkpoint))


def test_an_average_of_checkpoints_is_refused_with_the_mend() -> None:
    checkpoint = {key: value.float() / 2 for key, value in trained().state_dict().items()}
    refused(trained(), checkpoint, "conv1: .* are damaged; of checkpoints that are averaged or cast, take the plain_st")


@each_mode
def test_no_checkpoint_needs_more_than_weights_only_and_none_runs_code(mode: str, tmp_path: Path) -> None:
    net = trained(mode=mode)
    checkpoint = net.state_dict()
    for key in [key for key in checkpoint if key.endswith("_extra_state")]:
        file = io.BytesIO()
        torch.save({**checkpoint, key: Trap(tmp_path)}, file)
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(file, weights_only=True)
        refused(net, {**checkpoint, key: Trap(tmp_path)}, f"{key}. are damaged")
    assert not list(tmp_path.iterdir())
    net.load_state_dict(saved(checkpoint))
    assert loss_of(net).isfinite()


@pytest.mark.parametrize("entry", ["point", "_extra_state"])
def test_a_cluster_that_lacks_an_entry_is_named_before_anything_is_loaded(entry: str) -> None:
    checkpoint = trained(mode="parametrize").state_dict()
    del checkpoint[f"conv2.parametrizations.weight.0.{entry}"]
    refused(trained(mode="inplace"), checkpoint, rf"conv2: its cluster in the checkpoint has no .*\.{entry}")


def test_a_checkpoint_around_a_state_dict_is_not_taken_for_one() -> None:
    checkpoint = {"optimizer": {0: 1}, "model": trained().state_dict()}
    with pytest.raises(ValueError, match=r"state_dict under 'model': pass checkpoint\['model'\]"):
        hbnn_plugin.plain_state_dict(checkpoint)
