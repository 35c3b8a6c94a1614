"""Under every learning-rate schedule that torch has, a point's rate is its weight's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from inplace_nets import smooth
from tiny_hosts import latents, loss_of, points, twin
from training_helpers import each_mode

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lrs.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, total_iters=2),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.2, total_iters=3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.2, total_iters=2), lrs.PolynomialLR(o, 4)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.2, total_steps=6, cycle_momentum=False),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 4),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}
BASES = {"LRScheduler", "_LRScheduler"}


def test_the_list_is_whole() -> None:
    known = {*lrs.__all__, "SWALR"} - BASES
    assert known <= set(SCHEDULERS), "torch has a schedule that is not tried here"


def step(net: Any, optimizer: Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    loss_of(net, seed).backward()
    optimizer.step()


@each_mode
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_points_rate_follows_the_schedule(name: str, mode: str) -> None:
    """Each step is that of a fresh optimizer, without momentum, which was told the scheduled rate."""
    net = smooth(mode)
    optimizer = SGD(net.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    rates, moves = [], []
    for seed in range(5):
        rate = optimizer.param_groups[0]["lr"]
        reference, before = twin(net), points(net)
        step(reference, SGD(reference.parameters(), lr=rate), seed)
        step(net, optimizer, seed)
        for kind in (points, latents):
            found, expected = kind(net), kind(reference)
            assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        rates.append(float(rate))
        moves.append(points(net)["conv1"] - before["conv1"])
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len({round(rate, 6) for rate in rates}) > 1, "the schedule did nothing"
    assert all(bool(move.any()) is (rate > 0) for move, rate in zip(moves, rates))


@each_mode
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_point_steps_as_far_as_its_rate_says(as_tensor: bool, mode: str) -> None:
    """From one gradient at the origin, where Eq. 9 is −η∂L/∂p to first order."""
    lengths: list[Tensor] = []
    for rate in (1e-3, 2e-3, 4e-3):
        net = smooth(mode, rule="mobius")
        optimizer = SGD(net.parameters(), lr=1.0)
        lrs.LambdaLR(optimizer, lambda _, rate=rate: rate)
        if as_tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(rate, dtype=torch.float64)
        step(net, optimizer, 0)
        lengths.append(points(net)["conv1"].flatten(1).norm(dim=1))
    torch.testing.assert_close(lengths[1], 2 * lengths[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(lengths[2], 4 * lengths[0], rtol=1e-5, atol=0)
