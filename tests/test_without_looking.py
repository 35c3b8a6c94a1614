"""As on a GPU, where looking at a value means waiting for it: nothing is looked at, and training is the same."""

from __future__ import annotations

import functools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hbnn_plugin.cluster.settings import Rule
from hbnn_plugin.geometry import joint_maps
from hbnn_plugin.optimizer import recovery
from tiny_hosts import BINARY_LAYERS, SmoothConv, clusters, loss_of, points, state, train
from training_helpers import F64, OPTIMIZERS, applied, each_mode


def trained(monkeypatch: pytest.MonkeyPatch, *, look: bool, optimizer: str, **options: Any) -> dict[str, Tensor]:
    """Three steps, and one in which a filter's gradient is no number."""
    asked: list[Tensor] = []
    with monkeypatch.context() as patch:
        for module in (joint_maps, recovery):
            patch.setattr(module, "may_look", lambda x: bool(asked.append(x)) or look)  # type: ignore[func-returns-value]
        net = applied(SmoothConv, dtype=F64, radius=0.2, **options)
        chosen = OPTIMIZERS[optimizer](net.parameters())
        train(net, chosen, 3)
        chosen.zero_grad()
        loss_of(net, 3).backward()
        first = clusters(net)[BINARY_LAYERS[0]]
        assert first.parameter.grad is not None
        first.parameter.grad[1] = torch.nan
        before = points(net)[BINARY_LAYERS[0]]
        chosen.step()
        assert first.point.isfinite().all()
        if options["per"] == "filter":
            assert torch.equal(first.point[1], before[1])
        assert asked
    return state(net)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@each_mode
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("rule", get_args(Rule))
def test_training_is_the_same(monkeypatch: pytest.MonkeyPatch, rule: str, per: str, mode: str, optimizer: str) -> None:
    each = functools.partial(trained, monkeypatch, optimizer=optimizer, rule=rule, per=per, mode=mode)
    seen, unseen = each(look=True), each(look=False)
    assert seen.keys() == unseen.keys()
    for name, tensor in seen.items():
        # Adam enlarges roundings
        torch.testing.assert_close(unseen[name], tensor, rtol=1e-6, atol=1e-8, equal_nan=True)
