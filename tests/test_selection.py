"""Which layers apply and plan take, and what plan shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import hbnn_plugin
from hbnn_plugin import by_class, by_name
from tiny_hosts import BINARY_LAYERS, HardBinaryConv, IrConv, clusters, same_state, state, tiny_net, train


def layers_of(model: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in hbnn_plugin.plan(model, **options).layers]


class LibraryConv(nn.Conv2d):
    """As timm's StdConv2d or torchvision's Conv2dNormActivation would look to the predicate."""


class OwnOfLibrary(LibraryConv):
    """A host's own class on top of it."""


class OwnLinear(nn.Linear):
    pass


class Scale(nn.Module):
    """Has a two-dimensional parameter, but convolves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table.mean()


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(LibraryConv, "__module__", "timm.layers.std_conv")
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), IrConv(2, 2, 3), nn.BatchNorm2d(2))
    return nn.ModuleDict(
        {
            "plain": nn.Conv2d(2, 2, 3),
            "library": LibraryConv(2, 2, 3),
            "own": OwnOfLibrary(2, 2, 3),
            "hard": HardBinaryConv(2, 2),
            "inner": inner,
            "linear": OwnLinear(2, 2),
            "scale": Scale(),
            "transposed": nn.ConvTranspose2d(2, 2, 2),
            "embedding": nn.Embedding(3, 2),
        }
    )


def test_the_default_takes_convolutions_of_the_hosts_own_classes(zoo: nn.Module) -> None:
    assert layers_of(zoo) == ["own", "hard", "inner.1"]


def test_the_default_finds_layers_that_are_parametrized_already(zoo: nn.Module) -> None:
    register_parametrization(zoo["plain"], "weight", nn.Identity())
    assert layers_of(zoo) == ["own", "hard", "inner.1"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (by_name("inner"), ["inner.0", "inner.1"]),
        (by_name(r"^inner\.1$", "hard"), ["hard", "inner.1"]),
        (by_name("linear"), ["linear"]),
        (by_class(nn.Conv2d), ["plain", "library", "own", "inner.0", "inner.1"]),
        (by_class(HardBinaryConv, OwnLinear), ["hard", "linear"]),
        (lambda module, name: name.startswith("inner") and isinstance(module, IrConv), ["inner.1"]),
    ],
)
def test_predicates(zoo: nn.Module, where: Any, expected: list[str]) -> None:
    assert layers_of(zoo, where=where) == expected


@pytest.mark.parametrize(
    ("make", "given", "fragment"),
    [
        (by_name, ["conv"], "regular expressions as arguments of their own"),
        (by_class, [IrConv, HardBinaryConv], "classes as arguments of their own"),
        (by_class, "Conv2d", "classes as arguments of their own, not .'Conv2d'"),
    ],
)
def test_a_list_where_arguments_are_wanted_is_refused(make: Any, given: Any, fragment: str) -> None:
    with pytest.raises(TypeError, match=fragment):
        make(given)


@pytest.mark.parametrize(
    "options", [{}, {"space": "sphere", "per": "layer"}, {"binarize": "1/1", "where": by_name("stem")}]
)
def test_plan_prints_what_apply_would_do_and_changes_nothing(options: dict[str, Any]) -> None:
    net = tiny_net()
    before, classes, rng = state(net), [type(m) for m in net.modules()], torch.get_rng_state()
    hooks = [len(m._load_state_dict_pre_hooks) for m in net.modules()]
    made = hbnn_plugin.plan(net, **options)
    text = repr(made)
    names = ["stem"] if "binarize" in options else list(BINARY_LAYERS)
    assert [layer.name for layer in made.layers] == names
    assert len(made) == len(names)
    for layer in made.layers:
        row = next(line for line in text.splitlines() if line.startswith(layer.name))
        assert "×".join(map(str, layer.weight.shape)) in row
        assert row.split()[-1] == ("1" if options.get("per") == "layer" else str(layer.weight.shape[0]))
    assert same_state(state(net), before)
    assert [type(m) for m in net.modules()] == classes
    assert [len(m._load_state_dict_pre_hooks) for m in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), rng)


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))


class InnerFunction(OwnLayer):
    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.sign())

        return checkpoint(run, x, use_reentrant=False)


class InnerComprehension(OwnLayer):
    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [F.conv2d(x, self.weight.sign()) for x in xs]


class InProperty(OwnLayer):
    @property
    def run(self) -> Any:
        return lambda x: F.conv2d(x, self.weight.sign())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


@pytest.mark.parametrize("cls", [InnerFunction, InnerComprehension, InProperty])
def test_a_convolution_is_found_wherever_in_the_class_it_is_called(cls: Any) -> None:
    assert [layer.name for layer in hbnn_plugin.plan(nn.Sequential(cls())).layers] == ["0"]


def test_frozen_layers_are_left_out_unless_they_are_named() -> None:
    net = tiny_net()
    net.conv1.requires_grad_(False)
    made = hbnn_plugin.plan(net)
    assert [layer.name for layer in made.layers] == ["conv2"]
    assert repr(made).splitlines()[0].endswith("; left out, because frozen: conv1")
    assert len(hbnn_plugin.plan(net, where=hbnn_plugin.by_class(type(net.conv1)))) == 2
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="every binary convolution of TinyNet is frozen: conv1, conv2"):
        hbnn_plugin.apply(net)


def test_apply_on_parts_one_after_the_other() -> None:
    net = tiny_net()
    hbnn_plugin.apply(net, where=by_name("conv1"), radius=0.2)
    hbnn_plugin.apply(net, where=by_name("conv2"), space="sphere")
    assert {n: epc.settings.space for n, epc in clusters(net).items()} == {"conv1": "ball", "conv2": "sphere"}
    train(net, SGD(net.parameters(), lr=0.1), 2)
    assert [int(epc.steps) for epc in clusters(net).values()] == [2, 2]
    assert [type(m) for m in hbnn_plugin.fuse(net).modules()] == [type(m) for m in tiny_net().modules()]
