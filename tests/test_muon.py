"""The examples' Muon, written out, and where ``make_optimizer`` puts it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from geoopt_loop import newton_schulz
from hosts import HOSTS, binary_layers
from hosts.networks import resnet8
from muon import Muon
from training import Recipe, make_optimizer


@pytest.mark.parametrize("power", [0.5, 0.75])
@pytest.mark.parametrize("host", ["irnet", "mdtanh"])
def test_binary_layers_follow_the_orthogonal_factor_and_the_rest_sgd(host: str, power: float) -> None:
    torch.manual_seed(0)
    net = resnet8(HOSTS[host].conv, width=4).double()
    images, labels = torch.randn(8, 3, 8, 8, dtype=torch.double), torch.arange(8)
    optimizer = make_optimizer(net, HOSTS[host], Recipe(lr=0.3, weight_decay=5e-4, optimizer="muon", muon_power=power))
    assert isinstance(optimizer, Muon)
    binary = [layer.weight for _, layer in binary_layers(net)]
    expected = {p: p.detach().clone() for p in net.parameters()}
    momentum = {p: torch.zeros_like(p) for p in net.parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        for p, w in expected.items():
            assert p.grad is not None
            if any(p is b for b in binary):
                momentum[p].mul_(0.95).add_(p.grad)
                wide = (p.grad + 0.95 * momentum[p]).flatten(1)
                rate = 0.15 * 0.3**power
                w.mul_(1 - 0.02 * rate).sub_(rate * newton_schulz(wide).view_as(w))
            else:
                momentum[p].mul_(0.9).add_(p.grad + 5e-4 * w)
                w.sub_(0.3 * momentum[p])
        optimizer.step()
        for p, w in expected.items():
            assert torch.allclose(p, w, rtol=0, atol=1e-9)
