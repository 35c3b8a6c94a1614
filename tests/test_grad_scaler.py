"""GradScaler's scale and its skipped steps, which the points must not notice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny_hosts import BINARY_LAYERS, loss_of, points, state, train
from training_helpers import OPTIMIZERS, applied, moved, points_of


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grad_scaler_changes_nothing(name: str, fused: bool, order: str) -> None:
    reference, net = (applied(order=order) for _ in range(2))
    train(reference, OPTIMIZERS[name](reference.parameters(), fused=fused), 3)
    optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**12
    for key, value in state(reference).items():
        torch.testing.assert_close(state(net)[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")
    assert all(p.norm() > 0 for p in points(net).values())


@pytest.mark.parametrize("order", ["simultaneous", "alternating"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_grad_scaler_skips_leaves_everything_as_it_was(name: str, fused: bool, order: str) -> None:
    net = applied(point_momentum=0.5, point_decay=0.1, order=order)
    optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def one_step(seed: int, *, overflow: bool) -> dict[str, Tensor]:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        if overflow:  # elsewhere: the latents' own gradients are finite
            net.fc.weight.grad[0, 0] = torch.inf
        before = state(net)
        scaler.step(optimizer)
        scaler.update()
        return before

    one_step(0, overflow=False)
    before = one_step(1, overflow=True)
    changed = [key for key, value in state(net).items() if not torch.equal(value, before[key])]
    assert changed == []
    one_step(2, overflow=False)
    assert moved(net, points_of(before)) == list(BINARY_LAYERS)
