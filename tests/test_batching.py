"""One forward works out the maps of all its layers; nothing worked out is ever used for other values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from hbnn_plugin.cluster.parametrization import Parametrized
from hbnn_plugin.geometry import joint_maps
from tiny_hosts import BINARY_LAYERS, SmoothConv, tiny_net

pytestmark = pytest.mark.filterwarnings("ignore:.*two-valued")


def applied(**options: object) -> nn.Module:
    torch.manual_seed(0)
    net = tiny_net(SmoothConv)
    hbnn_plugin.apply(net, mode="parametrize", radius=0.2, **options)
    for layer in clusters(net):
        layer.point.normal_(std=0.05)
    return net


def clusters(net: nn.Module) -> list[Parametrized]:
    return [module for module in net.modules() if isinstance(module, Parametrized)]


def plain(net: nn.Module) -> nn.Module:
    """What the network computes, worked out layer by layer."""
    return hbnn_plugin.fuse(copy.deepcopy(net))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("per", ["filter", "layer"])
@pytest.mark.parametrize("space", ["ball", "sphere"])
def test_output_and_gradients_are_those_of_single_layers(space: str, per: str) -> None:
    net = tiny_net(SmoothConv)
    hbnn_plugin.apply(net, mode="parametrize", space=space, per=per)
    net(images()).square().sum().backward()
    together = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net.forward(images()).square().sum().backward()  # a direct call works nothing out
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-6, atol=1e-8)


class Noisy(nn.Module):
    """Writes into its parameters as its forward begins."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1)
        return self.net(x)


def test_what_a_forward_writes_into_its_parameters_counts() -> None:
    torch.manual_seed(0)
    model = hbnn_plugin.apply(Noisy(tiny_net(SmoothConv)), mode="parametrize")
    copied = copy.deepcopy(model)
    torch.testing.assert_close(model(images()), copied.forward(images()))  # called directly, nothing is worked out


def test_a_forward_maps_every_layer_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = applied(), []
    original = joint_maps._scalars
    monkeypatch.setattr(joint_maps, "_scalars", lambda maps, out: batches.append(len(maps)) or original(maps, out))
    net(images())
    assert batches == [len(BINARY_LAYERS)]
    assert all(epc.precomputed is None for epc in clusters(net))


class ReadsTwice(nn.Conv2d):
    """Asks for its weight several times, as hosts with a scale and a shape do; edits what it has read first."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean((1, 2, 3)).view(self.weight.size(0), 1, 1, 1)
        self.weight.data.zero_()  # memory of its own: nobody else's
        return self._conv_forward(x, self.weight.tanh() * scale, self.bias)


@pytest.mark.filterwarnings("ignore:.*something has written into its weight")
@pytest.mark.parametrize("size", [0.1, 1e20])  # the latter is prescaled
def test_a_weight_that_is_read_twice_is_mapped_once(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = hbnn_plugin.apply(nn.Sequential(ReadsTwice(3, 4, 3), ReadsTwice(4, 4, 3)), mode="parametrize")
    for layer in clusters(net):
        layer.point.normal_(std=0.05)
        layer.parameter.data.mul_(size)
    net.forward(images()).square().sum().backward()  # a direct call works nothing out
    single = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    maps = []
    original = joint_maps._scalars
    monkeypatch.setattr(joint_maps, "_scalars", lambda these, out: maps.extend(these) or original(these, out))
    net(images()).square().sum().backward()
    assert len(maps) == 2
    for parameter, grad in zip(net.parameters(), single):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-8)


def test_edits_that_bump_no_version_are_seen() -> None:
    net = applied()
    before = net(images())
    for layer in clusters(net):
        layer.parameter.data.mul_(-0.7)
    assert torch.equal(net(images()), plain(net)(images()))
    assert not torch.equal(net(images()), before)


def test_a_part_that_was_mapped_and_not_run_sees_later_edits() -> None:
    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = SmoothConv(3, 4, 3), SmoothConv(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    net = hbnn_plugin.apply(TwoParts(), mode="parametrize")
    net(images())
    find(net.two)["weight"].parameter.data.clamp_(-0.01, 0.01)  # as Wasserstein critics are clipped
    assert torch.equal(net.two(images()), plain(net).two(images()))


def test_after_a_forward_that_raised_edits_are_seen() -> None:
    net = applied()
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 7, 8, 8))
    for layer in clusters(net):
        layer.parameter.data.mul_(-0.7)
    assert torch.equal(net(images()), plain(net)(images()))


def test_after_a_forward_that_raised_nothing_mapped_is_left() -> None:
    net = applied()
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 7, 8, 8))
    assert all(epc.precomputed is None for epc in clusters(net))
    for layer in clusters(net):
        layer.parameter.data.mul_(-0.7)
    for name in BINARY_LAYERS:
        assert torch.equal(getattr(net, name).weight, getattr(plain(net), name).weight)


def test_applied_twice_to_one_model_each_map_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batches = tiny_net(SmoothConv), []
    for name in BINARY_LAYERS:
        hbnn_plugin.apply(net, mode="parametrize", where=hbnn_plugin.by_name(name))
    original = joint_maps._scalars
    monkeypatch.setattr(joint_maps, "_scalars", lambda maps, out: batches.append(len(maps)) or original(maps, out))
    net(images())
    assert batches == [len(BINARY_LAYERS)]
    hbnn_plugin.fuse(net)
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    assert not net._forward_hooks_always_called


def test_latents_that_wait_elsewhere_are_not_mapped() -> None:
    net = applied()
    for layer in clusters(net):
        layer.register_buffer("point", layer.point.to("meta"))  # as a replica's or an offloaded model's
        assert not layer.can_precompute


def test_two_reads_are_equal_and_share_no_memory() -> None:
    net = applied()
    layer = getattr(net, BINARY_LAYERS[0])
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, _: seen.extend((module.weight, module.weight)))
    net(images())
    assert torch.equal(*seen)
    assert seen[0].data_ptr() != seen[1].data_ptr()


def test_one_layer_near_the_edge_is_treated_with_care_and_the_others_are_not_changed_by_it() -> None:
    net = applied()
    first, *others = clusters(net)
    first.point.mul_(0.999 / (0.2**0.5 * first.point.flatten(1).norm(dim=1).view(-1, 1, 1, 1)))
    torch.testing.assert_close(net(images()), plain(net)(images()), rtol=1e-5, atol=1e-6)
    assert others
