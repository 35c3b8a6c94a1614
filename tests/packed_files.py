"""Packed files and the models that they are loaded into, looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from hbnn_plugin.export import load_packed
from hbnn_plugin.export.capture import binary_weights
from tiny_hosts import (
    same_state,
    state,
)


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: seen.bits for name, seen in binary_weights(net).items()}


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = bits(one), bits(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(one: Tensor, other: Tensor) -> bool:
    """Up to float rounding: torch's convolutions of real inputs round by where their operands lie in memory."""
    eps = torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=min(64 * eps, 0.02), atol=16 * eps)


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["hbnn_plugin"]
    )
    return found


def stored(path: Path) -> dict[str, Tensor]:
    return dict(sorted(load(path.read_bytes()).items()))


def refuses(path: Path, model: nn.Module, message: str) -> str:
    """Loading is a ValueError with this message, and the model is afterwards as it was."""
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(path, model)
    assert same_state(state(model), before)
    assert modes == [m.training for m in model.modules()]
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)
