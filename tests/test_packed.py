"""save_packed and load_packed: a file of one bit a binary weight gives the same bits and the same outputs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

import hbnn_plugin
import idiom_hosts
from full_precision_nets import BINARIZED, both, resnet
from hbnn_plugin import by_class, by_name
from hbnn_plugin.export import load_packed, save_packed
from hbnn_plugin.export.capture import binary_weights
from hosts import HOSTS as PAPER_HOSTS
from hosts import get_host
from hosts.networks import resnet8
from layer_kinds import LAYERS, SignLinear, tied_net
from packed_files import bits, close, header, same_bits, stored
from tiny_hosts import BINARY_LAYERS, HOSTS, IrConv, ScaledConv, batch, clusters, same_state, state, tiny_net, train
from training_helpers import each_host, each_mode, output, trained


@each_mode
@pytest.mark.parametrize("made", ["applied", "fused"])
@pytest.mark.parametrize("host", [*HOSTS, ScaledConv], ids=lambda h: h.__name__)
def test_outputs_and_bits_come_back(host: Any, made: str, mode: str, tmp_path: Path) -> None:
    net = trained(host, mode=mode)
    if made == "fused":
        hbnn_plugin.fuse(net)
    expected, before = output(net), state(net)
    save_packed(net.train(), tmp_path / "a")
    assert same_state(state(net), before) and net.training
    fresh = tiny_net(host, seed=7)
    assert not close(output(fresh), expected)
    assert load_packed(tmp_path / "a", fresh) is fresh
    assert not fresh.training
    assert close(output(fresh), expected)
    assert same_bits(fresh, net) and list(bits(net)) == list(BINARY_LAYERS)
    assert [type(m) for m in fresh.modules()] == [type(m) for m in tiny_net(host).modules()]
    assert list(fresh.state_dict()) == list(tiny_net(host).state_dict())
    save_packed(fresh, tmp_path / "b")
    first, second = (stored(tmp_path / name) for name in "ab")
    assert same_state(first, second)
    save_packed(load_packed(tmp_path / "b", fresh), tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_random_states_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seeded = trained(HOSTS[0]), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # also GPUs that have no part in it
    before = torch.get_rng_state()
    save_packed(net, tmp_path / "file")
    assert torch.equal(torch.get_rng_state(), before) and not seeded


@pytest.mark.parametrize("host", PAPER_HOSTS)
def test_networks_of_the_papers_hosts(host: str, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return resnet8(get_host(host, "resnet8").conv, width=8).double()  # no sign hangs on the rounding

    images, net = torch.randn(8, 3, 16, 16, dtype=torch.float64), hbnn_plugin.apply(make(0))
    optimizer = SGD(net.parameters(), lr=0.5)
    for step in range(3):
        get_host(host, "resnet8").set_progress(net, step / 2)
        optimizer.zero_grad()
        F.cross_entropy(net(images), torch.arange(8)).backward()
        optimizer.step()
    save_packed(net, tmp_path / "file")
    loaded = load_packed(tmp_path / "file", make(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net.eval()(images), rtol=1e-9, atol=1e-9)
    plain = hbnn_plugin.plain_state_dict(net.state_dict())
    packed = {f"{name}.weight" for name in bits(net)}
    assert len(packed) == 6
    for key, value in loaded.state_dict().items():
        assert key in packed or torch.equal(value, plain[key]), key  # running statistics, schedules, first layer ...


def test_evaluation_is_what_is_captured() -> None:
    net = resnet8(PAPER_HOSTS["mdtanh"].conv, width=8).train()  # in training it convolves with tanh(w)
    assert [seen.scale.unique().tolist() for seen in binary_weights(net).values()] == 6 * [[1.0]]
    assert all(m.training for m in net.modules())


IDIOMS = ["ClippedInForward", "CentredInForward", "OrgKept", "DerivedFromConvNd", "Contained", "ReadThrice"]


@pytest.mark.parametrize("name", [*IDIOMS, "FlatWeights"])
@pytest.mark.parametrize("applied", [False, True])
def test_hosts_that_edit_hide_or_flatten_their_weight(name: str, applied: bool, tmp_path: Path) -> None:
    host = getattr(idiom_hosts, name)()
    if applied:
        hbnn_plugin.apply(host.net)
    host.train()
    save_packed(host.net, tmp_path / "file")
    fresh = load_packed(tmp_path / "file", getattr(idiom_hosts, name)().net)
    expected = output(host.net)
    for _ in range(2):  # what its forward does to its weight does not pile up
        assert close(output(fresh), expected)
    assert same_bits(fresh, host.net)
    assert not any(hasattr(p, "org") for p in fresh.parameters())


def test_a_weight_that_somebody_else_made_binary(tmp_path: Path) -> None:
    host = idiom_hosts.Captured()
    host.train()
    host.bin_op.binarization()
    save_packed(host.net, tmp_path / "file")  # plain nn.Conv2d, found by their weight
    fresh = load_packed(tmp_path / "file", idiom_hosts.Captured().net)
    assert close(output(fresh), output(host.net))
    assert list(bits(fresh)) == ["conv1.conv", "conv2.conv"]


@both
@pytest.mark.parametrize("fused", [False, True])
def test_binarized_models(binarize: Any, fused: bool, tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        return hbnn_plugin.apply(resnet(seed), binarize=binarize)

    net = make(0)
    train(net, SGD(net.parameters(), lr=0.5), 2)
    if fused:
        hbnn_plugin.fuse(net)
    save_packed(net, tmp_path / "file")
    target = hbnn_plugin.fuse(make(1)) if binarize == "1/1" else resnet(1)
    load_packed(tmp_path / "file", target)
    assert close(output(target), output(net))
    assert list(bits(target)) == BINARIZED
    if binarize == "1/1":
        with pytest.raises(ValueError, match=r"layer1.conv1: SignConv2d in the file, Conv2d in the model; fuse\(apply"):
            load_packed(tmp_path / "file", resnet(1))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, tmp_path: Path) -> None:
    make, shape, units = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    where = by_class(type(layer))
    save_packed(layer, tmp_path / "file", where)
    seen = binary_weights(layer, where)[""]
    assert seen.scale.shape == (units,) and seen.value.shape == seen.bits.shape
    other = load_packed(tmp_path / "file", make())
    with torch.no_grad():
        assert close(other(x), layer(x))
    assert torch.equal(binary_weights(other, where)[""].bits, seen.bits)


class SignLinearNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(108, 6), SignLinear(6, 5), nn.BatchNorm1d(5), SignLinear(5, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_host
def test_dtypes_are_kept(host: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    net = tiny_net(host).to(dtype)
    save_packed(net, tmp_path / "file")
    fresh = load_packed(tmp_path / "file", tiny_net(host, 1).to(dtype))
    assert close(output(fresh), output(net))
    with pytest.raises(ValueError, match=r"stem.weight: \w+ \(4, 3, 3, 3\) in the file, float32 \(4, 3, 3, 3\) in the"):
        load_packed(tmp_path / "file", tiny_net(host))


class Rounded(IrConv):
    """Straight-through as most write it; the weight ends up next to ±scale."""

    def binary_weight(self) -> Tensor:
        w = self.weight
        return w.detach().abs().mean((1, 2, 3), keepdim=True) * w.detach().sign() - w.detach() + w


def test_straight_through_rounding_is_allowed_and_removed(tmp_path: Path) -> None:
    net = tiny_net(Rounded)
    net.conv1.weight.data[:, 0, 0] *= 50  # far beyond the scale
    assert len(net.conv1.binary_weight().abs().unique()) > 5
    save_packed(net, tmp_path / "file")
    fresh = load_packed(tmp_path / "file", tiny_net(Rounded, seed=2))
    assert len(fresh.conv1.weight.abs().unique()) == 5
    torch.testing.assert_close(output(fresh), output(net), rtol=1e-5, atol=1e-6)
    assert same_bits(fresh, net)


class Wrapped(nn.DataParallel):
    """As on a machine without GPUs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, device_ids=[])


def test_parallel_wrappers_are_looked_through(tmp_path: Path) -> None:
    net = trained(mode="inplace")
    save_packed(Wrapped(net), tmp_path / "file")
    assert header(tmp_path / "file")["layers"]["conv1"]["cluster"] == 0
    fresh = Wrapped(tiny_net(seed=1))
    assert load_packed(tmp_path / "file", fresh) is fresh and not fresh.training
    assert close(output(fresh), output(net))


def test_a_second_file_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    net, other = tiny_net(ScaledConv), tiny_net(ScaledConv, seed=1)
    save_packed(net, tmp_path / "both")
    save_packed(other, tmp_path / "one", by_name("conv1"))
    fresh = load_packed(tmp_path / "one", load_packed(tmp_path / "both", tiny_net(ScaledConv, seed=2)))
    assert close(output(fresh), output(other))


# -- ties --------------------------------------------------------------------------------------------------------------


def test_tied_layers_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = tied_net(ScaledConv)
        net(batch()[0])
        return net

    net = make()
    save_packed(hbnn_plugin.apply(net), tmp_path / "file")
    tensors = stored(tmp_path / "file")
    assert "0.1.weight.bits" in tensors and "0.2.weight.bits" not in tensors
    assert header(tmp_path / "file")["ties"] == {"0.2.weight": "0.1.weight"}
    fresh = make()
    with torch.no_grad():
        fresh[0][1].weight.neg_()
    load_packed(tmp_path / "file", fresh)
    assert fresh[0][1].weight is fresh[0][2].weight
    assert close(output(fresh), output(net))


def test_a_module_that_is_held_twice(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        net = tiny_net(ScaledConv, seed)
        net.again = nn.ModuleList([net.conv1, net.fc])
        return net

    net = make(0)
    save_packed(net, tmp_path / "file")
    fresh = load_packed(tmp_path / "file", make(1))
    assert close(output(fresh), output(net))
    assert header(tmp_path / "file")["ties"]["again.0.weight"] == "conv1.weight"
    assert "again.1.bias" not in stored(tmp_path / "file")


def test_where_names_the_binary_layers(tmp_path: Path) -> None:
    net = SignLinearNet()
    with pytest.raises(ValueError, match="Sequential has no binary layer"):
        save_packed(nn.Sequential(*list(net)[:2]), tmp_path / "file")
    save_packed(net, tmp_path / "file", by_name("^2$"))
    assert list(header(tmp_path / "file")["layers"]) == ["2"]
    fresh = load_packed(tmp_path / "file", SignLinearNet())
    assert close(output(fresh), output(net))
    assert not clusters(fresh)


def test_a_real_valued_checkpoint_makes_a_loaded_model_the_host_again(tmp_path: Path) -> None:
    path, real = tmp_path / "m.safetensors", tiny_net(seed=3).eval()
    save_packed(tiny_net(), path)
    loaded = load_packed(path, tiny_net(seed=1))
    packed = {name: value.clone() for name, value in loaded.state_dict().items()}
    x, _ = batch()
    before = loaded(x)
    loaded.conv1._register_load_state_dict_pre_hook(lambda *_: None)  # another one, behind ours
    loaded.load_state_dict(real.state_dict())
    torch.testing.assert_close(loaded(x), real(x))
    assert loaded.conv1.weight.requires_grad
    again = load_packed(path, tiny_net(seed=2))
    again.load_state_dict(packed)  # of another packed file: ±scale
    torch.testing.assert_close(again(x), before)
