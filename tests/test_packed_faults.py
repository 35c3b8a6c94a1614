"""What save_packed and load_packed refuse: one clear error, no file, the model as it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hbnn_plugin
from hbnn_plugin import by_name
from hbnn_plugin.export import load_packed, save_packed
from tiny_hosts import (
    BINARY_LAYERS,
    HardBinaryConv,
    HostConv,
    IrConv,
    ScaledConv,
    SimanZeroOneConv,
    SmoothConv,
    TinyNet,
    same_state,
    state,
    ste_sign,
    tiny_net,
)
from training_helpers import Doubled, applied, output

FIXTURES = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


def refuses(path: Path, model: nn.Module, message: str) -> str:
    """Loading is a ValueError with this message, and the model is afterwards as it was."""
    before, modes = state(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        load_packed(path, model)
    assert same_state(state(model), before)
    assert modes == [m.training for m in model.modules()]
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "file"
    save_packed(tiny_net(ScaledConv), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def net() -> TinyNet:
    return tiny_net(ScaledConv, seed=1)


NOT_OURS = r"is damaged: it is not what was written|is not a packed file of hbnn_plugin"


@settings(max_examples=150, **FIXTURES)
@given(data=st.data())
def test_any_flipped_bits(data: st.DataObject, good: bytes, net: TinyNet, tmp_path: Path) -> None:
    damaged = bytearray(good)
    for bit in data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3)):
        damaged[bit // 8] ^= 1 << bit % 8
    (tmp_path / "file").write_bytes(damaged)
    refuses(tmp_path / "file", net, NOT_OURS)


def test_bits_all_over_the_header(good: bytes, net: TinyNet, tmp_path: Path) -> None:
    end = 8 + int.from_bytes(good[:8], "little")
    for bit in range(0, 8 * end, 31):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(ValueError, match=NOT_OURS):
            load_packed(tmp_path / "file", net)


@settings(max_examples=50, **FIXTURES)
@given(data=st.data())
def test_cut_anywhere(data: st.DataObject, good: bytes, net: TinyNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    refuses(tmp_path / "file", net, NOT_OURS)


@settings(max_examples=50, **FIXTURES)
@given(more=st.binary(min_size=1), where=st.sampled_from(["before", "behind"]))
def test_with_something_added(more: bytes, where: str, good: bytes, net: TinyNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(good + more if where == "behind" else more + good)
    refuses(tmp_path / "file", net, NOT_OURS)


@settings(max_examples=50, **FIXTURES)
@given(content=st.binary())
def test_anything_else(content: bytes, net: TinyNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    refuses(tmp_path / "file", net, NOT_OURS)


def test_a_file_that_is_not_there(net: TinyNet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "nothing", net)


# -- files with the right checksum that save_packed did not write ------------------------------------------------------


def rewritten(good: bytes, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """The file with its safetensors header and ours edited, and the checksum of that."""
    end = 8 + int.from_bytes(good[:8], "little")
    outer = json.loads(good[8:end])
    ours = json.loads(outer["__metadata__"]["hbnn_plugin"])
    edit(outer, ours)
    ours["sha256"] = "0" * 64
    metadata = {"__metadata__": {"hbnn_plugin": json.dumps(ours, separators=(",", ":"))}}
    head = json.dumps({**metadata, **{k: v for k, v in outer.items() if k != "__metadata__"}}, separators=(",", ":"))
    whole = len(head).to_bytes(8, "little") + head.encode() + good[end:]
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


def test_the_rewriting_itself_is_right(good: bytes, net: TinyNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(rewritten(good, lambda outer, ours: None))
    fresh = load_packed(tmp_path / "file", tiny_net(ScaledConv, seed=2))
    torch.testing.assert_close(output(fresh), output(tiny_net(ScaledConv)))


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every item of nested dicts and lists."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, **FIXTURES)
@given(data=st.data(), which=st.sampled_from(["safetensors", "ours"]))
def test_any_other_header_is_an_error_or_loads(
    data: st.DataObject, which: str, good: bytes, net: TinyNet, tmp_path: Path
) -> None:
    def edit(outer: dict[str, Any], ours: dict[str, Any]) -> None:
        root = outer if which == "safetensors" else ours
        *way, last = data.draw(st.sampled_from(list(places(root))))
        for key in way:
            root = root[key]
        if data.draw(st.booleans()) and isinstance(root, dict):
            del root[last]
        else:
            root[last] = data.draw(ANYTHING)

    try:
        changed = rewritten(good, edit)
    except (KeyError, TypeError):  # the metadata itself is gone
        return
    (tmp_path / "file").write_bytes(changed)
    before = state(net)
    try:
        load_packed(tmp_path / "file", net)
    except ValueError:
        assert same_state(state(net), before)
        assert not any("forward" in vars(m) for m in net.modules())
    else:  # it changed nothing that matters, such as the plugin's version or a scale
        output(net)
        net.__dict__.update(tiny_net(ScaledConv, seed=1).__dict__)


def test_another_format_is_named(good: bytes, net: TinyNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(rewritten(good, lambda _, ours: ours.update(format=2)))
    refuses(tmp_path / "file", net, r"is of format 2 with bit order 'little'; hbnn_plugin .* reads format 1 with")
    (tmp_path / "file").write_bytes(rewritten(good, lambda _, ours: ours.update(bit_order="big")))
    refuses(tmp_path / "file", net, r"is of format 1 with bit order 'big'")


def test_a_header_that_contradicts_the_tensors(good: bytes, net: TinyNet, tmp_path: Path) -> None:
    def edit(_: dict[str, Any], ours: dict[str, Any]) -> None:
        ours["layers"]["conv1"]["shape"] = [2**20, 2**20]

    (tmp_path / "file").write_bytes(rewritten(good, edit))
    refuses(tmp_path / "file", net, "contradicts itself")


# -- files that do not fit ---------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_packed(tiny_net(ScaledConv), tmp_path / "file")
    return tmp_path / "file"


def test_every_difference_is_listed(path: Path) -> None:
    model = tiny_net(ScaledConv)
    model.conv1 = ScaledConv(4, 5, 5, padding=2)
    model.bn1 = nn.Identity()
    model.bn2 = nn.InstanceNorm2d(6, affine=True)
    model.extra = nn.Linear(2, 2)
    model.fc = nn.Linear(6, 4, dtype=torch.float64)
    model.conv2 = IrConv(5, 6, 3, stride=2, padding=1)
    text = refuses(path, model, "does not fit TinyNet, which stays as it was:")
    lines = {line.strip() for line in text.splitlines()[1:]}
    assert lines == {
        "extra.weight: in the model, not in the file",
        "extra.bias: in the model, not in the file",
        *(f"bn1.{n}: in the file, not in the model" for n in ("weight", "bias", "running_mean", "running_var")),
        *(f"bn{i}.num_batches_tracked: in the file, not in the model" for i in (1, 2)),
        *(f"bn2.{n}: in the file, not in the model" for n in ("running_mean", "running_var")),
        "conv1.weight: float32 (5, 4, 3, 3) in the file, float32 (5, 4, 5, 5) in the model",
        "conv1: a weight of logical shape (5, 4, 3, 3) in the file, (5, 4, 5, 5) in the model",
        "conv2: ScaledConv in the file, IrConv in the model",
        "fc.weight: float32 (4, 6) in the file, float64 (4, 6) in the model",
        "fc.bias: float32 (4,) in the file, float64 (4,) in the model",
    }


class Dense(nn.Conv2d):
    """Called as a host's layer is, and convolving with nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=1) @ self.weight.mean()


def test_layers_that_are_missing_or_do_not_convolve(path: Path) -> None:
    model = tiny_net(ScaledConv)
    Dense.__name__ = "ScaledConv"
    model.conv1, model.conv2 = Dense(4, 5, 3, padding=1), nn.Identity()
    text = refuses(path, model, "conv1: on a small input the model's layer runs no convolution")
    assert "conv2: a binary layer in the file; the model has no such layer with a weight" in text


def test_a_model_without_values(path: Path) -> None:
    with torch.device("meta"):
        model = TinyNet(ScaledConv)
    with pytest.raises(ValueError, match=r"fc\.bias: the model has no values there yet; initialize it first"):
        load_packed(path, model)


def test_a_forward_on_the_instance(path: Path) -> None:
    model = tiny_net(ScaledConv)
    model.conv1.forward = model.conv1.forward
    with pytest.raises(ValueError, match="conv1: something has put another forward on this instance"):
        load_packed(path, model)


def test_ties_of_the_model_that_the_file_does_not_have(path: Path, tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.bn2.bias = nn.Parameter(net.bn2.weight + 1)
    save_packed(net, tmp_path / "other")
    model = tiny_net(ScaledConv)
    model.bn2.bias = model.bn2.weight
    refuses(tmp_path / "other", model, "bn2.bias: the same tensor as bn2.weight in the model, another in the file")


@pytest.mark.parametrize("mode", ["parametrize", "inplace"])
def test_applied_models_are_refused(mode: str, path: Path) -> None:
    refuses(path, applied(ScaledConv, mode=mode), "hbnn_plugin.apply was called on conv1, conv2: load it into a new")


def test_a_models_own_hook_that_raises_half_way(path: Path) -> None:
    model = tiny_net(ScaledConv, seed=1)

    def hook(*_: Any) -> None:
        raise RuntimeError("not mine")

    model.fc._register_load_state_dict_pre_hook(hook)
    before = state(model)
    with pytest.raises(RuntimeError, match="not mine"):
        load_packed(path, model)
    assert same_state(state(model), before)


# -- what is not saved -------------------------------------------------------------------------------------------------


def not_saved(model: nn.Module, tmp_path: Path, message: str, where: Any = None) -> str:
    before = state(model) if not hasattr(model, "note") else {}
    with pytest.raises(ValueError, match=message) as caught:
        save_packed(model, tmp_path / "never", where)
    assert not list(tmp_path.iterdir())
    assert not before or same_state(state(model), before)
    return str(caught.value)


@pytest.mark.parametrize("host", [SmoothConv, SimanZeroOneConv])
@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_layers_that_are_not_binary_are_named(host: Any, tmp_path: Path) -> None:
    for net in (tiny_net(host), applied(host)):
        text = not_saved(net, tmp_path, "not binary in evaluation mode:\n  conv1: 5 of 5 filters are not ±scale")
        assert re.search(r"conv2: 6 of 6 filters are not ±scale: in filter 0 \|w\| is \S+ to \S+\n", text)
    not_saved(tiny_net(), tmp_path, "fc: 4 of 4 filters are not ±scale", by_name("^fc$"))


@pytest.mark.filterwarnings("ignore:.*two-valued")
def test_a_real_layer_with_a_cluster_is_named(tmp_path: Path) -> None:
    net = hbnn_plugin.apply(tiny_net(), where=by_name("fc"))
    not_saved(net, tmp_path, "fc: 4 of 4 filters are not ±scale")
    save_packed(net, tmp_path / "file", by_name("conv"))


def test_no_module(tmp_path: Path) -> None:
    for call in (save_packed, load_packed):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, not (str|PosixPath)"):
            call(str(tmp_path), tmp_path)  # type: ignore[arg-type]


def test_one_weight_off_is_not_binary(tmp_path: Path) -> None:
    class Off(IrConv):
        def binary_weight(self) -> Tensor:
            w = super().binary_weight().clone()
            w[3, 0, 0, 0] *= 1 + 1e-5
            return w

    not_saved(tiny_net(Off), tmp_path, r"conv1: 1 of 5 filters are not ±scale: in filter 3 \|w\| is 1 to 1\.00001")


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.conv2.weight.data[0, 0, 0, 0] = torch.nan
    not_saved(net, tmp_path, r"conv2: what it convolves with holds 45 non-finite value\(s\)")


def test_models_without_a_binary_layer(tmp_path: Path) -> None:
    not_saved(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Embedding(3, 2)), tmp_path, "Sequential has no binary layer")
    for weight in (torch.zeros(4, 3), torch.ones(4, 3)):  # constants are no binary weights
        linear = nn.Linear(3, 4)
        linear.weight.data.copy_(weight)
        not_saved(nn.Sequential(linear, nn.Linear(1, 4)), tmp_path, "has no binary layer")


def test_a_layer_that_cannot_be_run(tmp_path: Path) -> None:
    class TwoInputs(IrConv):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    not_saved(TwoInputs(2, 2, 3), tmp_path, "TwoInputs: on a small input its forward runs no convolution")


class ScaledBehind(HostConv):
    """XNOR-Net with its scale behind the convolution."""

    def binary_weight(self) -> Tensor:
        return ste_sign(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.abs().mean((1, 2, 3))[:, None, None]


def test_a_latent_weight_that_matters_otherwise(tmp_path: Path) -> None:
    not_saved(tiny_net(ScaledBehind), tmp_path, "conv1, conv2: with its binary weight alone the layer's output is")


def test_a_binary_weight_that_is_used_elsewhere(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    net.other = nn.Linear(1, 1)
    net.other.weight = net.conv1.weight
    not_saved(net, tmp_path, "cannot be packed:\n  conv1: its weight is also other.weight, which is not binary")


def test_a_shared_weight_that_is_binarized_in_two_ways(tmp_path: Path) -> None:
    net = nn.Sequential(ScaledConv(4, 4, 3), IrConv(4, 4, 3))
    net[1].weight = net[0].weight
    not_saved(net, tmp_path, "0 and 1 share a weight and make different binary weights of it")


def test_somebody_elses_parametrization(tmp_path: Path) -> None:
    net = tiny_net(ScaledConv)
    parametrize.register_parametrization(net.conv1, "weight", Doubled())
    not_saved(net, tmp_path, "conv1: its weight is parametrized; remove that parametrization first")


class Noted(IrConv):
    note = "a sentence"

    def get_extra_state(self) -> str:
        return self.note


def test_states_that_are_no_tensors(tmp_path: Path) -> None:
    net = tiny_net(Noted)
    net.note = ""
    not_saved(net, tmp_path, r"conv1._extra_state \(str\) is no tensor with values")


def test_what_a_file_of_a_flat_host_says(tmp_path: Path) -> None:
    save_packed(tiny_net(HardBinaryConv), tmp_path / "file")
    model = tiny_net(HardBinaryConv)
    model.conv1.weights = nn.Parameter(model.conv1.weights.reshape(-1))
    refuses(tmp_path / "file", model, r"conv1.weights: float32 \(180, 1\) in the file, float32 \(180,\) in the model")
    assert BINARY_LAYERS == ("conv1", "conv2")
