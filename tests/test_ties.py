"""Weights that two layers share, one of them outside of what is applied to or fused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import hbnn_plugin
from tiny_hosts import IrConv


class Pair(nn.Module):
    """Two layers with one weight."""

    def __init__(self, second: type = IrConv) -> None:
        super().__init__()
        self.a = IrConv(3, 3, 3, padding=1)
        self.b = second(3, 3, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_a_weight_tied_to_an_unselected_layer_takes_in_place_mode() -> None:
    model = Pair(nn.Conv2d)
    before = copy.deepcopy(model.state_dict())
    tie = r"a has its weight tied to b\.weight, which is not selected"
    with pytest.raises(ValueError, match=f"{tie}: select that too, or apply with mode='inplace'"):
        hbnn_plugin.apply(model, mode="parametrize")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plan = hbnn_plugin.plan(model)
    assert plan.mode == "inplace" and re.fullmatch(tie, plan.reason)
    hbnn_plugin.apply(model)
    assert model.a.weight is model.b.weight


def test_applying_to_the_other_end_of_a_tie_is_refused() -> None:
    model = Pair()
    assert hbnn_plugin.plan(model, where=hbnn_plugin.by_name("^b$")).mode == "inplace"
    hbnn_plugin.apply(model.a)
    with pytest.raises(ValueError, match="b: its weight is tied to IrConv, which apply was called on before"):
        hbnn_plugin.apply(model, where=hbnn_plugin.by_name("^b$"))


def test_fusing_one_end_of_a_tie_is_refused() -> None:
    model = hbnn_plugin.apply(Pair())
    with pytest.raises(ValueError, match="tied to a layer outside"):
        hbnn_plugin.fuse(model.a)
    hbnn_plugin.fuse(model)
    assert model.a.weight is model.b.weight
