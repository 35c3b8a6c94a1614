"""Packed files that are damaged, or that save_packed did not write: one clear error, the model as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbnn_plugin.export import load_packed, save_packed
from packed_files import refuses
from tiny_hosts import (
    ScaledConv,
    TinyNet,
    same_state,
    state,
    tiny_net,
)
from training_helpers import output

FIXTURES = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


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
