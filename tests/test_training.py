"""The examples' training loop, written once more; what it measures; where its decay acts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flips import FlipMeter, OscillationMeter
from hosts import HOSTS, binary_layers
from hosts.networks import resnet8
from images import Images
from training import Recipe, fit, make_optimizer, progress_bar

RECIPE = Recipe(epochs=3, batch_size=4, lr=0.1, momentum=0.9, weight_decay=0.01, seed=3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(HOSTS["plain"].conv(3, 4, 3), nn.Hardtanh(), nn.Flatten(), nn.Linear(4 * 36, 10))


def image_set() -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(8), (0.5,) * 3, (0.25,) * 3, shift=1, flip=True)


def test_training_is_sgd_with_a_cosine_and_tells_the_host_how_far_it_is() -> None:
    seen: list[float] = []
    host = replace(HOSTS["plain"], set_progress=lambda _, progress: seen.append(progress))
    model, images = network(), image_set()
    optimizer = make_optimizer(model, host, RECIPE)
    with progress_bar("", 6) as bar:
        progress = fit(model, optimizer, host, images, images, RECIPE, FlipMeter(model), bar)
    assert seen == [0, 1 / 3, 2 / 3]

    expected = network()
    momentum = [torch.zeros_like(p) for p in expected.parameters()]
    losses: list[list[float]] = []
    for epoch in range(3):
        lr = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
        losses.append([])
        for batch, labels in images.epoch(3, epoch, 4):
            loss = F.cross_entropy(expected(batch), labels)
            expected.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p, m in zip(expected.parameters(), momentum, strict=True):
                    assert p.grad is not None
                    m.mul_(0.9).add_(p.grad + 0.01 * p)
                    p.sub_(lr * m)
            losses[-1].append(loss.item())
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert [r["train_loss"] for r in progress.history] == pytest.approx([sum(x) / 2 for x in losses], rel=1e-5)
    with torch.no_grad():
        (batch, labels) = next(replace(images, shift=0, flip=False).batches(8))
        assert progress.history[-1]["test_accuracy"] == (expected(batch).argmax(1) == labels).float().mean().item()


def test_oscillation_counts_weights_that_go_and_come_back() -> None:
    model = network()[:1]
    (weight,) = (layer.weight for _, layer in binary_layers(model))
    signs = torch.ones(4, weight.numel())
    half = weight.numel() // 2
    signs[2:, :half] = -1  # gone for good
    signs[1, half] = signs[3, half] = -1  # there, back, and there again
    signs[2, half + 1] = -1  # there and back
    with torch.no_grad():
        weight.copy_(signs[0].view_as(weight))
        meter = OscillationMeter(model)
        for row in signs[1:]:
            weight.copy_(row.view_as(weight))
            meter.sample(model)
    assert meter.ratio() == pytest.approx(2 / weight.numel())
    meter.restart(model)
    assert meter.ratio() == 0


@pytest.mark.parametrize("name", HOSTS)
def test_weight_decay_of_latent_weights(name: str) -> None:
    """The latent weights of SiMaN and of mirror descent do not decay."""
    net = resnet8(HOSTS[name].conv, width=4)
    optimizer = make_optimizer(net, HOSTS[name], Recipe())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(layer.weight)] for _, layer in binary_layers(net)} == {
        0.0 if name in ("siman", "mdtanh") else 5e-4
    }
    assert decays[id(net.linear.weight)] == 5e-4
