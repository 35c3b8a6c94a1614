"""Looking at a value means waiting for it on a GPU. Meta tensors, which have none, refuse to be looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hbnn_plugin import inplace
from tiny_hosts import SmoothConv, TinyNet, batch, train
from training_helpers import OPTIMIZERS, applied


def on_meta(**options: Any) -> TinyNet:
    """A network on the meta device, which has trained for so long that nobody watches its first steps any more."""
    net = applied(SmoothConv, **options)
    train(net, OPTIMIZERS["sgd"](net.parameters()), 21)
    net.zero_grad()
    return net.to("meta")


def meta_step(net: TinyNet, optimizer: str = "sgd") -> None:
    net(batch()[0].to("meta")).sum().backward()
    OPTIMIZERS[optimizer](net.parameters()).step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("rule", ["spectral", "mobius", "fixed"])
def test_a_step_looks_at_nothing(rule: str, per: str, optimizer: str) -> None:
    meta_step(on_meta(rule=rule, per=per), optimizer)


@pytest.mark.parametrize("rule", ["spectral", "mobius", "fixed"])
def test_an_inplace_step_looks_for_all_layers_together(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = on_meta(rule=rule, mode="inplace")
    looks: list[int] = []

    def chosen(items: Sequence[Any], flags: Iterable[Tensor]) -> list[Any]:
        looks.append(len(list(flags)))
        return list(items) if len(looks) % 4 == 2 else []  # say that all weights were edited, and nothing else

    monkeypatch.setattr(inplace, "chosen", chosen)
    meta_step(net)
    meta_step(net)
    # left alone since the last step (there was none on this device)? edited? out of the ball? gradient cleared?
    assert looks == [0, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("mode", ["parametrize", "inplace"])
def test_nobody_looks_while_a_cuda_graph_is_recorded(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net = applied(SmoothConv, mode=mode).to("meta")
    net(batch()[0].to("meta")).sum().backward()
