"""The weight right after apply, and after an assignment: what it was, or a warning."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import hbnn_plugin
from tiny_hosts import (
    HOSTS,
    HardBinaryConv,
    HostConv,
    IrConv,
    ScaledConv,
    SimanZeroOneConv,
    batch,
    binary_bits,
    clusters,
    tiny_net,
    train,
)


def scaled_to(net: nn.Module, norm: float) -> Any:
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (HostConv, HardBinaryConv)):
                w = next(p for p in layer.parameters() if p.ndim > 1)
                w.mul_(norm / w.norm())
    return net


OPTIONS = [
    {"space": space, "per": per, "relative": relative, **start}
    for space, per, relative in itertools.product(("ball", "sphere"), ("filter", "layer"), (False, True))
    for start in ([{}, {"start": 0.7}, {"start": 1.0}] if space == "ball" else [{}])
]


@pytest.mark.parametrize("norm", [0.1, 32.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("host", [*HOSTS, SimanZeroOneConv], ids=lambda h: h.__name__)
@pytest.mark.filterwarnings("ignore:.*start at the edge of the ball")
def test_binary_weights_are_what_they_were_right_after_apply(host: Any, options: dict[str, Any], norm: float) -> None:
    net = scaled_to(tiny_net(host), norm).eval()
    bits = list(binary_bits(net))
    weights = [next(p for p in layer.parameters() if p.ndim > 1).detach().clone() for layer in (net.conv1, net.conv2)]
    hbnn_plugin.apply(net, **options)
    assert len(bits) == 2
    for before, after in zip(bits, binary_bits(net)):
        assert torch.equal(before, after)
    for weight, epc in zip(weights, clusters(net).values()):
        now = epc(epc.parameter).detach()
        assert F.cosine_similarity(now.flatten(), weight.flatten(), dim=0) > 0.98
        inside = options["space"] == "ball" and (norm == 0.1 or options["relative"])
        if inside or (options["space"] == "sphere" and options["relative"]):
            torch.testing.assert_close(now, weight, rtol=2e-4, atol=2e-6 * norm)


def test_weights_outside_the_ball_are_reported_with_the_mend() -> None:
    with pytest.warns(
        UserWarning, match=r"^2 point\(s\) of conv1, conv2 start at the edge.*4.47.*relative=True.*per='filter'"
    ) as caught:
        hbnn_plugin.apply(scaled_to(tiny_net(), 32.0), per="layer")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    net = tiny_net()
    net.conv1.weight.data *= 100
    with pytest.warns(UserWarning, match=r"^5 point\(s\) of conv1 start at the edge") as caught:
        hbnn_plugin.apply(net)
    assert "per=" not in str(caught[0].message)


@pytest.mark.parametrize("per", ["filter", "layer"])
def test_relative_keeps_the_output_itself_of_a_pretrained_host(per: str) -> None:
    net = scaled_to(tiny_net(ScaledConv), 32.0)
    train(net, SGD(net.parameters(), lr=0.1), 2)
    net.eval()
    x, _ = batch(9, n=4)
    before = net(x)
    with pytest.warns(UserWarning, match="start at the edge"):
        shrunk = hbnn_plugin.apply(copy.deepcopy(net), per=per, radius=1.0)
    assert not torch.allclose(shrunk(x), before, rtol=1e-2)
    hbnn_plugin.apply(net, per=per, relative=True)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if not o["relative"]], ids=lambda o: "-".join(map(str, o.values()))
)
@pytest.mark.parametrize("trained", [False, True])
def test_an_assigned_weight_reads_back(options: dict[str, Any], trained: bool) -> None:
    net = hbnn_plugin.apply(scaled_to(tiny_net(), 1.0), **options)
    optimizer = SGD(net.parameters(), lr=0.1)
    if trained:
        train(net, optimizer, 2)
    latent = clusters(net)["conv1"].parameter
    w = torch.randn(net.conv1.weight.shape)
    filters = (slice(None),) if options["per"] == "layer" else range(5)
    for f in filters:
        w[f] *= 0.4 / w[f].norm()
    if options["space"] == "ball":
        net.conv1.weight = w
        torch.testing.assert_close(net.conv1.weight.detach(), w, rtol=1e-4, atol=1e-6)
    else:
        for f in filters:
            w[f] /= w[f].norm()
        net.conv1.weight = w  # on the sphere
        torch.testing.assert_close(net.conv1.weight.detach(), w, rtol=1e-3, atol=1e-4)
    far = w * 50
    with pytest.warns(
        UserWarning, match=r"conv1: the assigned weight does not lie .* for \d of \d point.*direction is kept"
    ):
        net.conv1.weight = far
    for f in filters:
        assert F.cosine_similarity(net.conv1.weight[f].flatten(), far[f].flatten(), dim=0) > 1 - 1e-5
    assert clusters(net)["conv1"].parameter is latent
    with pytest.raises(ValueError, match="conv1: the weight holds 1 non-finite"):
        net.conv1.weight = w.where(torch.arange(w.numel()).reshape(w.shape) != 7, torch.nan)
    with pytest.raises(ValueError, match=r"conv1: expected a weight of shape \(5, 4, 3, 3\), got \(2, 2\)"):
        net.conv1.weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"conv1: expected a weight of shape \(5, 4, 3, 3\), got \(5, 36\)"):
        net.conv1.weight = torch.ones(5, 36)


def test_messages_name_a_model_that_is_itself_the_layer() -> None:
    with pytest.warns(UserWarning, match=r"^1 point\(s\) of IrConv start"):
        hbnn_plugin.apply(scaled_to(IrConv(2, 1, 3), 10.0))
    layer = hbnn_plugin.apply(IrConv(2, 1, 3))
    with pytest.warns(UserWarning, match="^IrConv: the assigned weight"):
        layer.weight = torch.full((1, 2, 3, 3), 10.0)


def test_tiny_weights_have_a_place_on_the_sphere() -> None:
    net = tiny_net()
    with torch.no_grad():
        net.conv1.weight.mul_(1e-25)
    before = net.conv1.weight.sign()
    hbnn_plugin.apply(net, space="sphere")
    assert torch.equal(net.conv1.weight.sign(), before)


def test_the_warning_of_an_assignment_points_at_it() -> None:
    model = hbnn_plugin.apply(tiny_net())
    with pytest.warns(UserWarning, match="conv1: the assigned weight") as caught:
        model.conv1.weight = 100 * torch.ones(5, 4, 3, 3)
    assert caught[0].filename == __file__
