"""Flip ratios and cluster reports count what the host's forward convolves with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import hbnn_plugin
from hbnn_plugin import by_class, by_name, cluster_report, flip_ratio
from hbnn_plugin.host.bits import binary_value, is_two_valued, pack_bits, unpack_bits
from hbnn_plugin.host.convolved import convolved_weight
from tiny_hosts import (
    BINARY_LAYERS,
    HOSTS,
    HardBinaryConv,
    IrConv,
    RecuConv,
    ScaledConv,
    SimanConv,
    SimanZeroOneConv,
    SmoothConv,
    TinyNet,
    batch,
    binary_bits,
    clusters,
    same_state,
    state,
    tiny_net,
    train,
)

EVERY_HOST = [*HOSTS, SimanZeroOneConv, ScaledConv]


def applied(host: Any = IrConv, seed: int = 0, **options: Any) -> TinyNet:
    return hbnn_plugin.apply(tiny_net(host, seed), **options)


def bits_of(net: nn.Module) -> dict[str, Tensor]:
    return dict(zip(BINARY_LAYERS, [b.clone() for b in binary_bits(net)]))


@pytest.mark.parametrize("host", EVERY_HOST, ids=lambda h: h.__name__)
def test_flips_are_counted_on_what_the_host_convolves_with(host: Any) -> None:
    net = applied(host)
    start = bits_of(net)
    assert dict(flip_ratio(net)) == {"conv1": 0.0, "conv2": 0.0}
    train(net, SGD(net.parameters(), lr=2.0), 3)
    now = bits_of(net)
    ratio = flip_ratio(net)
    by_hand = {name: int((now[name] != start[name]).sum()) for name in BINARY_LAYERS}
    assert all(by_hand.values())
    assert ratio.flips == by_hand
    assert ratio.weights == {"conv1": 180, "conv2": 270}
    assert ratio["conv1"] == by_hand["conv1"] / 180
    assert ratio.total == sum(by_hand.values()) / 450
    # reset counts once more, then from now on
    assert flip_ratio(net, reset=True).flips == by_hand
    assert flip_ratio(net).total == 0
    train(net, SGD(net.parameters(), lr=2.0), 3, first=3)
    assert flip_ratio(net).flips == {name: int((bits_of(net)[name] != now[name]).sum()) for name in BINARY_LAYERS}


def test_the_total_is_over_weights_not_over_layers() -> None:
    ratio = hbnn_plugin.FlipRatio({"small": 10, "large": 0}, {"small": 10, "large": 90})
    assert ratio.total == 0.1


@pytest.mark.parametrize("host", [SimanConv, SimanZeroOneConv])
def test_a_siman_like_host_is_counted_on_its_split(host: Any) -> None:
    """Its split knows magnitudes alone: turning every weight round flips nothing, though every raw sign changes."""
    net = applied(host)
    with torch.no_grad():
        net.conv1.weight = -net.conv1.weight
    assert flip_ratio(net)["conv1"] == 0
    flipped = applied(IrConv)
    with torch.no_grad():
        flipped.conv1.weight = -flipped.conv1.weight
    assert flip_ratio(flipped)["conv1"] == 1


def test_an_irnet_like_host_is_counted_around_its_filters_mean() -> None:
    net = applied(IrConv)
    with torch.no_grad():
        net.conv1.weight = net.conv1.weight + 0.5  # every raw weight is positive now
    assert bool((net.conv1.weight > 0).all())
    assert flip_ratio(net)["conv1"] == 0
    raw = applied(ScaledConv)
    positive = int((raw.conv1.weight > 0).sum())
    with torch.no_grad():
        raw.conv1.weight = raw.conv1.weight + 0.5
    assert flip_ratio(raw).flips["conv1"] == 180 - positive


def test_flip_ratio_is_a_mapping_with_a_table_as_repr() -> None:
    net = applied()
    train(net, SGD(net.parameters(), lr=2.0), 2)
    ratio = flip_ratio(net)
    assert isinstance(ratio, Mapping)
    assert list(ratio) == list(ratio.keys()) == list(BINARY_LAYERS)
    assert len(ratio) == 2
    assert "conv2" in ratio
    assert "stem" not in ratio
    assert ratio.get("stem") is None
    with pytest.raises(KeyError):
        ratio["stem"]
    assert dict(ratio.items()) == {name: ratio[name] for name in BINARY_LAYERS}
    title, header, rule, *rows = repr(ratio).splitlines()
    assert "flip ratio" in title
    assert header.split() == ["layer", "weights", "flips", "ratio"]
    assert set(rule) == {"-", " "}
    assert [row.split()[0] for row in rows] == ["conv1", "conv2", "total"]
    assert rows[0].split()[1:] == ["180", str(ratio.flips["conv1"]), f"{100 * ratio['conv1']:.2f}", "%"]
    assert rows[2].split()[1:3] == ["450", str(sum(ratio.flips.values()))]
    assert f"{100 * ratio.total:.2f} %" in rows[2]


class WithState(IrConv):
    """Counts its forwards, tracks a mean, draws noise and drops inputs: all of it is to be as it was."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(self.in_channels))
        self.inner = nn.BatchNorm2d(self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.5)
        self.mean = self.mean * 0.9 + torch.rand(1).item()  # assigned, not written in place
        x = self.inner(F.dropout(x, 0.5, self.training))
        return super().forward(x + torch.rand_like(x))


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_layer_leaves_buffers_and_the_random_state_alone(training: bool) -> None:
    net = tiny_net(WithState).train(training)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    objects = {name: b for name, b in net.named_buffers()}
    rng = torch.get_rng_state()
    hbnn_plugin.apply(net)
    state_after_apply = state(net)
    flip_ratio(net)
    cluster_report(net)
    flip_ratio(net, reset=True)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same_state(state(net), state_after_apply)
    now = dict(net.named_buffers())
    for name, value in buffers.items():
        assert torch.equal(now[name], value), name
        assert now[name] is objects[name], name
    assert net.training is training
    assert all(p.grad is None for p in net.parameters())


def test_hooks_of_the_layer_do_not_see_the_look() -> None:
    net = tiny_net()
    seen = []
    net.conv1.register_forward_hook(lambda *_: seen.append(1))
    net.conv1.register_forward_pre_hook(lambda *_: seen.append(2))
    hbnn_plugin.apply(net)
    flip_ratio(net)
    assert seen == []
    net(batch()[0])
    assert seen == [2, 1]


class NeedsMore(IrConv):
    """Cannot be run on an input of the plugin's making."""

    def forward(self, x: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        return super().forward(x * temperature)


def test_a_host_that_wants_other_inputs_is_counted_by_the_sign_of_its_weight() -> None:
    layer = NeedsMore(3, 4, 3)
    with pytest.warns(
        UserWarning, match="^NeedsMore: what it convolves with could not be seen on a small input.*sign of its weight"
    ):
        hbnn_plugin.apply(layer)
    assert convolved_weight(layer, (4, 3, 3, 3), layer.weight) is None
    positive = int((layer.weight > 0).sum())
    with torch.no_grad():
        layer.weight = layer.weight.abs()
    (ratio,) = flip_ratio(layer).values()
    assert ratio == (108 - positive) / 108


# -- two-valued or not --------


def test_a_real_valued_layer_is_reported() -> None:
    with pytest.warns(
        UserWarning, match=r"^conv1, conv2: the forward does not convolve with a two-valued weight.*where="
    ):
        applied(SmoothConv)
    with pytest.warns(UserWarning, match="^fc: the forward does not convolve") as caught:
        hbnn_plugin.apply(tiny_net(), where=by_class(nn.Linear, IrConv))
    assert len(caught) == 1
    assert caught[0].filename == __file__


class Rounding(IrConv):
    """Straight-through by subtracting and adding: two values up to rounding."""

    def binary_weight(self) -> Tensor:
        w = self.weight
        return w.sign().detach() - w.detach() + w


@pytest.mark.parametrize("host", [*EVERY_HOST, Rounding, WithState], ids=lambda h: h.__name__)
def test_binary_layers_are_not_reported(host: Any) -> None:
    applied(host)  # warnings are errors here
    hbnn_plugin.apply(tiny_net(host), space="sphere", per="layer")


def test_is_two_valued() -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0], [0.2, 0.2, -0.2]])
    assert is_two_valued(signs)
    assert is_two_valued((signs > 0).float())
    assert is_two_valued(torch.ones(2, 3))
    assert is_two_valued(signs + 1e-5 * torch.randn(2, 3))
    w = torch.linspace(-1, 1, 18).reshape(2, 9).bfloat16()
    assert is_two_valued(w.sign() - w + w) and not is_two_valued(w)
    assert not is_two_valued(torch.tensor([[1.0, 0.0, -1.0]]))  # ternary
    assert not is_two_valued(torch.randn(4, 9))


def test_of_two_values_of_one_sign_the_upper_counts() -> None:
    weight = torch.tensor([[0.5, 1.5, 0.5], [-1.5, -0.5, -1.5], [0.0, 1.0, 0.0], [-1.0, 1.0, -1.0]])
    assert binary_value(weight).tolist() == [[False, True, False]] * 4
    assert torch.equal(binary_value(weight.t(), (1,)), binary_value(weight).t())
    rounding = torch.tensor([[1.0, 1.0 + 1e-7, 1.0 - 1e-7], [-1.0, -1.0 - 1e-7, -1.0]])  # of one value, with rounding
    assert binary_value(rounding).tolist() == [[True] * 3, [False] * 3]


def test_convolved_weight_is_what_the_convolution_gets() -> None:
    for host in EVERY_HOST:
        layer = host(3, 4, 3)
        weight = next(p for p in layer.parameters() if p.ndim > 1)
        found = convolved_weight(layer, (4, 3, 3, 3), weight)
        assert found is not None
        assert torch.equal(found, layer.binary_weight())
        assert not found.requires_grad


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_pack_and_unpack(bits: list[bool]) -> None:
    tensor = torch.tensor(bits)
    packed = pack_bits(tensor)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(bits) + 7) // 8
    assert torch.equal(unpack_bits(packed, len(bits)), tensor)


# -- cluster_report --------


@pytest.mark.parametrize(
    "options", [{}, {"per": "layer"}, {"relative": True}, {"space": "sphere"}, {"start": 0.5}], ids=str
)
def test_cluster_report(options: dict[str, Any]) -> None:
    net = applied(**options)
    at_start = cluster_report(net)
    report_at_start = 1.0 if options.get("space") == "sphere" else 0.0
    for layer in at_start.values():
        assert layer.steps == 0
        if "start" not in options:
            assert layer.reach == pytest.approx(report_at_start, abs=1e-5)
    train(net, SGD(net.parameters(), lr=1.0), 3)
    report = cluster_report(net)
    assert isinstance(report, Mapping)
    assert list(report) == list(BINARY_LAYERS)
    assert len(report) == 2
    for name, epc in clusters(net).items():
        rows = epc.point.reshape(1 if options.get("per") == "layer" else epc.point.shape[0], -1)
        radius = epc.settings.radius
        unit = 1.0 if epc.scale is None else epc.scale.reshape(-1)
        reach = radius**0.5 * rows.norm(dim=1) / unit
        layer = report[name]
        assert layer.points == rows.shape[0]
        assert layer.steps == 3
        assert layer.reach == pytest.approx(float(reach.max()), rel=1e-4)
        assert layer.mean_reach == pytest.approx(float(reach.mean()), rel=1e-4)
        assert 0 < layer.reach <= 1 + 1e-5
        module = net.get_submodule(name)
        bare = IrConv(module.in_channels, module.out_channels, 3)
        bare.weight.data.copy_(epc.parameter)
        differs = (bare.binary_weight() > 0) != (module.binary_weight() > 0)
        assert layer.disagreement == pytest.approx(float(differs.float().mean()))
    if "start" not in options:  # there p and v share their direction
        assert any(layer.disagreement > 0 for layer in report.values())
    title, header, _, *lines = repr(report).splitlines()
    assert "clusters" in title
    assert header.split()[:3] == ["layer", "points", "steps"]
    assert [line.split()[0] for line in lines] == list(BINARY_LAYERS)
    assert f"{report['conv1'].reach:.4f}" in lines[0]
    assert f"{100 * report['conv2'].disagreement:.2f} %" in lines[1]


def test_reports_name_layers_by_their_place() -> None:
    net = nn.Sequential(nn.Sequential(IrConv(3, 3, 1)), HardBinaryConv(3, 2), RecuConv(2, 2, 2))
    hbnn_plugin.apply(net, where=by_name("0.0", "2"))
    assert list(flip_ratio(net)) == list(cluster_report(net)) == ["0.0", "2"]
    assert list(flip_ratio(copy.deepcopy(net))) == ["0.0", "2"]


@pytest.mark.parametrize("look", [hbnn_plugin.flip_ratio, hbnn_plugin.cluster_report])
def test_looking_between_forward_and_backward_is_harmless(look: object) -> None:
    model = hbnn_plugin.apply(tiny_net())
    loss = model(torch.randn(4, 3, 6, 6)).square().sum()
    look(model)  # type: ignore[operator]
    loss.backward()


class Rewriting(ScaledConv):
    """Writes its clipped weight back in every forward."""

    def binary_weight(self) -> torch.Tensor:
        self.weight.data = self.weight.data.clamp(-0.01, 0.01)
        return super().binary_weight()


def test_looking_at_a_host_that_rewrites_its_weight_changes_nothing() -> None:
    torch.manual_seed(0)
    model = TinyNet(Rewriting)
    before = model.conv1.weight.detach().clone()
    hbnn_plugin.apply(model)
    assert torch.allclose(model.conv1.weight, before, atol=1e-6)
    assert hbnn_plugin.flip_ratio(model).total == 0
    assert F.cosine_similarity(model.conv1.weight.flatten(1), before.flatten(1)).min() > 0.9999
