"""Whole trainings against independent loops: the bare host where the map is the identity, geoopt where points move."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbnn_plugin
from geoopt_loop import train_with_geoopt
from hbnn_plugin.cluster.epc import find
from hosts import get_host
from hosts.networks import resnet8
from tiny_hosts import SmoothConv, TinyNet
from tiny_hosts import latent as latent_of

STEPS = 5

MOVES = [
    *itertools.product(("mobius", "riemannian", "spectral"), (0.0, 0.5), (False, True)),
    *itertools.product(("riemannian-adam",), (0.0,), (False, True)),  # its momentum is its own
    ("fixed", 0.0, False),  # nothing moves, whoever steps
]
"""Every rule with the momenta it obeys, its points stepped with the optimizer or by ClusterSGD."""

both_modes = pytest.mark.parametrize("mode", ["parametrize", "inplace"])


@pytest.mark.parametrize("host_name", ["irnet", "recu", "siman"])
@pytest.mark.parametrize("per", ["filter", "layer"])
@both_modes
def test_the_identity_map_leaves_the_hosts_trajectory(host_name: str, per: str, mode: str) -> None:
    """In float64, and no activation at zero: else rounding turns a sign, and what follows is another training."""
    host = get_host(host_name, "resnet8")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 16, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 10, (3, 16), generator=generator)

    def train(applied: bool) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(0)
        model = resnet8(host.conv, width=4).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # a bias of zero keeps at zero the sums of ±1 that equal their mean
                nn.init.normal_(module.bias)
        host.set_progress(model, 0.3)
        if applied:
            hbnn_plugin.apply(model, radius=1e-15, rule="fixed", per=per, mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        losses = []
        for x, y in zip(images, labels, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, losses

    bare, bare_losses = train(applied=False)
    ours, our_losses = train(applied=True)
    hbnn_plugin.fuse(ours)
    assert our_losses == pytest.approx(bare_losses, rel=1e-11)
    for (name, mine), (bare_name, reference) in zip(ours.named_parameters(), bare.named_parameters(), strict=True):
        assert name == bare_name
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-12), name


@pytest.mark.filterwarnings("ignore:.*two-valued")
@pytest.mark.parametrize(("rule", "point_momentum", "explicit"), MOVES)
@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("space", ["ball", "sphere"])
@both_modes
def test_moving_points_follow_an_independent_loop_written_with_geoopt(
    space: str, per: str, rule: str, point_momentum: float, explicit: bool, mode: str
) -> None:
    radius, point_lr = (0.05, 0.7) if space == "ball" else (1.0, 0.7)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 8, 3, 6, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (STEPS, 8), generator=generator)

    def build() -> TinyNet:
        torch.manual_seed(2)
        return TinyNet(SmoothConv).double()

    latents, points = train_with_geoopt(
        build(), images, labels, space, per, rule, radius, point_momentum, lr=0.05, point_lr=point_lr
    )
    options = {"space": space, "radius": radius, "per": per, "rule": rule, "point_lr": point_lr}
    model = hbnn_plugin.apply(build(), **options, point_momentum=point_momentum, mode=mode)
    optimizer_class = hbnn_plugin.ClusterSGD if explicit else torch.optim.SGD
    optimizer = optimizer_class(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    for layer, latent, point in zip((model.conv1, model.conv2), latents, points, strict=True):
        epc = find(layer)["weight"]
        start = torch.zeros_like(point) if space == "ball" else None
        assert torch.allclose(latent_of(epc).reshape(latent.shape), latent, rtol=1e-11, atol=1e-13)
        assert torch.allclose(epc.point.reshape(point.shape), point, rtol=1e-11, atol=1e-13)
        if rule != "fixed" and start is not None:
            assert not torch.allclose(point, start, atol=1e-5)  # it did move
