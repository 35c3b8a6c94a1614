"""Mixed precision: autocast, and GradScaler's scale and its skipped steps, which the points must not notice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tiny_hosts import BINARY_LAYERS, IrConv, ScaledConv, batch, clusters, latents, loss_of, points, state, train
from training_helpers import OPTIMIZERS, applied, each_mode, moved, points_of, steps

each_order = pytest.mark.parametrize("order", ["simultaneous", "alternating"])
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
fused_or_not = pytest.mark.parametrize("fused", [False, True])
each_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@each_mode
@each_order
@fused_or_not
@each_optimizer
def test_grad_scaler_changes_nothing(name: str, fused: bool, order: str, mode: str) -> None:
    reference, net = (applied(order=order, mode=mode) for _ in range(2))
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


@each_mode
@each_order
@fused_or_not
@each_optimizer
@pytest.mark.parametrize("where", ["elsewhere", "in the layer"])
@pytest.mark.parametrize("rule", ["spectral", "mobius"])
def test_a_step_that_grad_scaler_skips_leaves_everything_as_it_was(
    rule: str, name: str, fused: bool, order: str, mode: str, where: str
) -> None:
    net = applied(rule=rule, point_momentum=0.5, point_decay=0.1, order=order, mode=mode)
    optimizer = OPTIMIZERS[name](net.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def one_step(seed: int, *, overflow: bool) -> dict[str, Tensor]:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, seed)).backward()
        if overflow:
            bad = net.fc.weight if where == "elsewhere" else clusters(net)["conv1"].parameter
            bad.grad[0, 0] = torch.inf
        before = state(net)
        scaler.step(optimizer)
        scaler.update()
        return before

    # after a skipped first step torch's fused SGD takes its momentum from fresh memory, whatever is in it
    if name == "sgd" and fused:
        one_step(9, overflow=False)
    for seed in (0, 2):
        before = one_step(seed, overflow=True)
        changed = [key for key, value in state(net).items() if not torch.equal(value, before[key])]
        assert changed == []
        one_step(seed + 1, overflow=False)
        assert moved(net, points_of(before)) == list(BINARY_LAYERS)
        assert all(value.isfinite().all() for value in state(net).values())
    assert scaler.get_scale() == 2.0**10


@each_mode
@each_half
def test_autocast_leaves_the_map_in_float32(mode: str, half: torch.dtype) -> None:
    net, plain = applied(mode=mode), applied(mode=mode)
    with torch.autocast("cpu", dtype=half):
        assert torch.equal(net.conv1.weight, plain.conv1.weight)
        assert net.conv1.weight.dtype == torch.float32
        assert net.conv1(batch()[0].repeat(1, 2, 1, 1)[:, :4]).dtype == half


def autocast_loop(net: nn.Module, half: torch.dtype, scale: float, steps: int = 6, lr: float = 0.05) -> list[float]:
    """The usual loop with autocast, GradScaler and clipping; the scales that its steps had."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scales = []
    for seed in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=half):
            loss = loss_of(net, seed)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return scales


@each_mode
@each_half
def test_autocast_trains_as_single_precision_does_to_its_rounding(mode: str, half: torch.dtype) -> None:
    net, reference = (applied(ScaledConv, mode=mode) for _ in range(2))
    start = latents(net)
    autocast_loop(net, half, scale=8.0)
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9), 6)
    assert steps(net) == [6, 6]
    for name in BINARY_LAYERS:
        for mine, theirs, before in (
            (points(net)[name], points(reference)[name], torch.zeros(())),
            (latents(net)[name], latents(reference)[name], start[name]),
        ):
            assert float((mine - theirs).norm()) < 0.1 * float((theirs - before).norm())


@each_mode
def test_steps_whose_gradients_overflow_in_fp16_move_nothing_and_the_rest_counts(mode: str) -> None:
    """A scale far beyond float16's range: GradScaler halves it until gradients are finite, then doubles it again."""
    net, reference = (applied(IrConv, mode=mode) for _ in range(2))
    scales = autocast_loop(net, torch.float16, scale=2.0**20, steps=16)
    skipped = [one > two for one, two in pairwise(scales)] + [False]
    taken = [seed for seed, skip in enumerate(skipped[:-1]) if not skip]
    assert sum(skipped) >= 3 and len(taken) >= 3
    made = steps(net)
    assert made in ([len(taken)] * 2, [len(taken) + 1] * 2)  # the last step's fate shows in no later scale
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for seed in [*taken, 15][: made[0]]:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(reference, seed)
        (loss * 2.0**4).backward()
        for p in reference.parameters():
            p.grad.mul_(2.0**-4)
        optimizer.step()
    for name in BINARY_LAYERS:
        assert points(net)[name].isfinite().all()
        torch.testing.assert_close(latents(net)[name], latents(reference)[name], rtol=0.05, atol=5e-3)
