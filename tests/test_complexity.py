"""complexity: [HBNN] Table IV to the digit, what packed files weigh, and every operation on its layer's account."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

import hbnn_plugin
from full_precision_nets import BINARIZED, resnet
from hbnn_plugin.export import load_packed, save_packed
from hbnn_plugin.export.complexity import Complexity, LayerComplexity, complexity
from hosts import HOSTS
from hosts.networks import NETWORKS, resnet8
from idiom_hosts import BinBlock, ClippedConv
from layer_kinds import LAYERS
from tiny_hosts import HardBinaryConv, ScaledConv, SmoothConv, same_state, state, tiny_net
from training_helpers import applied, trained

TINY = (3, 6, 6)


def float_conv(*args: Any, bias: bool = False, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, bias=bias, **options)


# -- Table IV ----------------------------------------------------------------------------------------------------------

TABLE_IV = [
    ("resnet18_imagenet", 46.76, 18.21e8, 4.15, 1.63e8, 4.27),
    ("resnet34_imagenet", 87.19, 36.74e8, 5.41, 1.93e8, 5.62),
]


@pytest.mark.parametrize(("arch", "megabytes", "ops", "binary_megabytes", "binary_ops", "goal"), TABLE_IV)
def test_table_4_and_the_file_on_disk(
    arch: str, megabytes: float, ops: float, binary_megabytes: float, binary_ops: float, goal: float, tmp_path: Path
) -> None:
    real = complexity(NETWORKS[arch](float_conv), (3, 224, 224))
    assert real.paper.megabytes == pytest.approx(megabytes, rel=1e-3)
    assert real.paper.ops == pytest.approx(ops, rel=1e-3)
    model = NETWORKS[arch](HOSTS["plain"].conv)  # a scale for each filter, the largest file
    binary = complexity(model, (3, 224, 224))
    weights = {"resnet18_imagenet": 10_985_472, "resnet34_imagenet": 21_086_208}[arch]
    assert binary.paper.megabytes == pytest.approx((694_440 * 4 + weights / 8) / 1e6, rel=1e-12)
    assert binary.paper.megabytes == pytest.approx(binary_megabytes, rel=1e-2)
    assert binary.paper.ops == pytest.approx(binary_ops, rel=1e-2)
    assert sum(layer.multiply_adds for layer in binary.values()) == 137_793_536
    save_packed(model, tmp_path / "file")
    on_disk = (tmp_path / "file").stat().st_size / 1e6
    assert binary.total.megabytes == pytest.approx(on_disk, rel=1e-2)
    assert on_disk <= goal


@pytest.mark.parametrize("host", HOSTS)
def test_bytes_are_those_of_the_file(host: str, tmp_path: Path) -> None:
    model = resnet8(HOSTS[host].conv)
    books = complexity(model, (3, 16, 16))
    save_packed(model, tmp_path / "file")
    stored = load((tmp_path / "file").read_bytes())
    assert books.total.megabytes == sum(t.numel() * t.element_size() for t in stored.values()) / 1e6
    for name, layer in books.items():
        own = [t for key, t in stored.items() if key.startswith(f"{name}.")]
        assert layer.bytes == sum(t.numel() * t.element_size() for t in own) or layer.parameters == 0


# -- layer by layer ----------------------------------------------------------------------------------------------------


class Books(nn.Module):
    """Of each kind of operation one, for counting by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.binary = ScaledConv(4, 6, 3, padding=1, bias=False)
        self.block = BinBlock(6, 6, 3, groups=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 5)
        with torch.no_grad():
            self.block.conv.weight.sign_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))  # 4 × 3 × 3
        x = F.hardtanh(self.binary(x))  # 6 × 3 × 3, of real inputs
        x = torch.relu(self.block(x))  # 6 × 1 × 1, of signs
        x = self.fc(x.flatten(1)).relu()
        return x @ x.mT


def test_every_operation_and_byte_by_hand() -> None:
    found = complexity(Books(), TINY)
    assert dict(found) == {
        "Books": LayerComplexity("Books", 0, 0, 0, 5, 0, 54 + 6 + 5),
        "conv": LayerComplexity("Conv2d", 112, 32, 448, 36 * 27, 0, 0),
        "norm": LayerComplexity("BatchNorm2d", 8, 32, 4 * 16 + 8, 0, 0, 2 * 36),
        "binary": LayerComplexity("ScaledConv", 216, 1, 27 + 4 * 6, 54 * 36, 0, 0),
        "block.conv": LayerComplexity("Conv2d", 162, 1, math.ceil(162 / 8), 0, 6 * 27, 0),
        "relu": LayerComplexity("ReLU", 0, 0, 0, 0, 0, 36),
        "fc": LayerComplexity("Linear", 35, 32, 140, 30, 0, 0),
    }
    floats = 36 * 27 + 54 * 36 + 30 + 5
    assert found.paper == ((4 * (112 + 35) + (216 + 162) / 8) / 1e6, floats + 6 * 27 / 64)
    assert found.total == ((448 + 72 + 51 + 21 + 140) / 1e6, floats + 65 + 72 + 36 + 6 * 27 / 64)


def test_without_binary_layers_all_parameters_and_batchnorm_count() -> None:
    model = resnet()
    found = complexity(model, TINY)
    assert found.paper.megabytes == 4 * sum(p.numel() for p in model.parameters()) / 1e6
    assert found.paper.ops == found.total.ops == sum(x.multiply_adds + x.elementwise for x in found.values())
    assert not any(x.binary_multiply_adds for x in found.values())
    assert found["layer1.relu"].elementwise == 2 * 4 * 36  # one module that runs twice


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str) -> None:
    make, shape, _ = LAYERS[kind]
    net = nn.Sequential(make())
    name, found = "0", complexity(net, shape[1:])
    (weight,) = [p for p in net[0].parameters() if p.ndim > 1]
    y = net(torch.randn(1, *shape[1:]))
    if "transposed" in kind:
        expected = math.prod(shape[2:]) * weight.numel()
    else:
        units = y.shape[1]
        expected = y.numel() * weight.numel() // units
    if kind == "linear":  # no class that the default predicate takes, and rounded: real-valued for all it knows
        assert found[name].binary_multiply_adds == 0
    assert found[name].multiply_adds + found[name].binary_multiply_adds == expected


def made(kind: str) -> nn.Module:
    net = trained(mode="inplace" if kind == "inplace" else None)
    return hbnn_plugin.fuse(net) if kind == "fused" else net


@pytest.mark.parametrize("kind", ["parametrize", "inplace", "fused", "loaded"])
def test_the_books_of_an_applied_model_are_the_plain_ones(kind: str, tmp_path: Path) -> None:
    expected = complexity(tiny_net(), TINY)
    net = made(kind)
    if kind == "loaded":
        save_packed(net, tmp_path / "file")
        net = load_packed(tmp_path / "file", tiny_net())
    found = complexity(net, TINY)
    assert dict(found) == dict(expected)
    assert (found.paper, found.total) == (expected.paper, expected.total)
    assert found["conv1"].bits == 1 and found["stem"].bits == 32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("binarize", ["1/1", "1/32"])
def test_real_inputs_make_no_binary_operations(binarize: Any, fused: bool) -> None:
    net = hbnn_plugin.apply(resnet(), binarize=binarize)
    found = complexity(hbnn_plugin.fuse(net) if fused else net, TINY)
    assert [name for name, layer in found.items() if layer.bits == 1] == BINARIZED
    for name in BINARIZED:
        layer = found[name]
        assert bool(layer.binary_multiply_adds) is (binarize == "1/1")
        assert bool(layer.multiply_adds) is (binarize == "1/32")


@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_layers_of_a_binary_class_that_are_not_binary_count_as_real() -> None:
    for net in (tiny_net(SmoothConv), applied(SmoothConv)):
        found = complexity(net, TINY)
        assert {layer.bits for layer in found.values()} == {32}
        assert found.paper.megabytes == 4 * sum(p.numel() for p in tiny_net().parameters()) / 1e6


def test_tied_tensors_count_once_and_their_operations_twice() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(ScaledConv(3, 3, 3, padding=1), ScaledConv(3, 3, 3, padding=1))

    tied, apart = make(), make()
    tied[1].weight = tied[0].weight
    one, two = complexity(tied, TINY), complexity(apart, TINY)
    assert one.paper.ops == two.paper.ops
    assert two.paper.megabytes - one.paper.megabytes == pytest.approx(81 / 8e6)
    for field in ("parameters", "bytes"):
        assert sum(getattr(x, field) for x in one.values()) < sum(getattr(x, field) for x in two.values())
    shared = copy.deepcopy(apart)
    shared[1] = shared[0]
    assert complexity(shared, TINY)["0"].multiply_adds == 2 * two["0"].multiply_adds


class Rotated(ScaledConv):
    """Multiplies more than it convolves."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        return super().forward((x + 0 * (flat.T @ flat).sum()).sign())


def test_other_products_of_a_binary_layer_are_real() -> None:
    found = complexity(nn.Sequential(Rotated(3, 4, 3)), TINY)["0"]
    assert (found.multiply_adds, found.binary_multiply_adds) == (27 * 27 * 4, 27 * 4 * 16)


def test_a_layer_that_its_parent_runs_past_the_hooks_counts_as_any_other() -> None:
    class Past(nn.Module):
        def __init__(self, past: bool) -> None:
            super().__init__()
            self.conv = ScaledConv(3, 4, 3)
            self.past = past

        def forward(self, x: Tensor) -> Tensor:
            return self.conv.forward(x) if self.past else self.conv(x)

    past, called = Past(past=True), Past(past=False)
    assert dict(complexity(past, TINY)) == dict(complexity(called, TINY))
    assert "forward" not in vars(past.conv)


class ByKeyword(ScaledConv):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(input=x.sign(), weight=self.weight.sign(), padding=self.padding)


def test_a_convolution_called_by_keywords_counts_as_any_other() -> None:
    found = complexity(nn.Sequential(ByKeyword(3, 4, 3)), TINY)["0"]
    assert (found.multiply_adds, found.binary_multiply_adds) == (0, 27 * 4 * 16)


# -- what is left as it was --------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Does in its forward what it should not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net(ClippedConv)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x + 0.1 * torch.rand_like(x))


@pytest.mark.parametrize("make", [Noisy, trained, lambda: applied(HardBinaryConv, mode="inplace")])
def test_model_mode_and_random_state_stay(make: Callable[[], nn.Module]) -> None:
    net = make().train()
    net.get_submodule("net.bn1" if isinstance(net, Noisy) else "bn1").eval()
    before, modes, seed = state(net), [m.training for m in net.modules()], torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    first, second = complexity(net, TINY), complexity(net, TINY)
    assert dict(first) == dict(second)
    assert same_state(state(net), before)
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(torch.get_rng_state(), seed)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]


def test_an_input_that_does_not_fit_is_one_error() -> None:
    with pytest.raises(ValueError, match=r"TinyNet does not run on one input of shape \(4, 6, 6\) \(a batch dimension"):
        complexity(tiny_net(), (4, 6, 6))


def test_what_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"the example has the shape \(2, 3, 6, 6\); give a batch of one"):
        complexity(tiny_net(), torch.ones(2, *TINY))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, not dict"):
        complexity({}, TINY)  # type: ignore[arg-type]


def test_its_repr_is_the_table() -> None:
    found = complexity(tiny_net(), TINY)
    lines = repr(found).splitlines()
    assert lines[0] == "one input of shape (3, 6, 6)"
    assert lines[1].split() == [
        "layer",
        "kind",
        "parameters",
        "bits",
        "bytes",
        "multiply-adds",
        "binary",
        "elementwise",
    ]
    assert lines[4].split() == ["conv1", "IrConv", "185", "1", "43", "6480", "0", "0"]
    assert lines[-3].split()[:2] == ["sum", str(sum(p.numel() for p in tiny_net().parameters()))]
    assert lines[-2] == f"by the paper's convention: {found.paper.megabytes:.4g} MB, {found.paper.ops:.4g} operations"
    assert lines[-1].startswith("in total: ")
    assert isinstance(found, Complexity) and len(found) == len(lines) - 6


class OfTokens(nn.Module):
    """A binary linear layer behind an embedding, which takes no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 3)
        nn.init.constant_(self.linear.weight, -0.5)
        self.linear.weight.data[:, ::2] = 0.5

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.linear(self.embedding(tokens))
        return result


def test_an_example_where_the_input_is_no_float() -> None:
    found = complexity(OfTokens(), torch.zeros(1, 7, dtype=torch.int64))
    assert found["linear"].bits == 1 and found["linear"].multiply_adds == 7 * 12 and found.input_shape == (7,)


class Skewed(nn.Conv2d):
    """Two values a filter, which are not ±scale (AdaBin)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.where(self.weight >= 0, 0.7, -0.2), padding=1)


def test_a_layer_that_should_be_binary_and_is_not_has_a_note() -> None:
    found = complexity(nn.Sequential(Skewed(3, 4, 3)), TINY)
    assert found["0"].bits == 32
    assert re.search(r"\n0 counts as real-valued: 4 of 4 filters are not ±scale", repr(found))
    assert complexity(tiny_net(), TINY).notes == {}


def test_a_model_without_anything() -> None:
    assert "0 MB, 0 operations" in repr(complexity(nn.Identity(), TINY))
