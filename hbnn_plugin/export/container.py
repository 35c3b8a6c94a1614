"""The packed file itself: named tensors and a JSON header in a safetensors file, under a checksum of every byte.

The header is the entry ``hbnn_plugin`` of safetensors' metadata. Its first item, ``sha256``, is the checksum of the
whole file with these 64 hexadecimal digits read as zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..version import __version__
from .files import beside

__all__ = ["BIT_ORDER", "FORMAT", "Contents", "PackedLayer", "read", "write"]

FORMAT = 1
"""Version of the format; a reader refuses any other."""

BIT_ORDER = "little"
"""The first weight of eight is in the least significant bit of their byte."""

_MARK, _ZEROS = rb'"{\"sha256\":\"', b"0" * 64


@dataclass(frozen=True)
class PackedLayer:
    """One binary layer, as the header describes it (what is as by default is left out there).

    For a layer ``conv`` and a tensor ``weight``, the tensor ``conv.weight.bits`` holds one bit a weight, 1 for +scale,
    eight a byte (uint8). That and the description are enough to read the weight without the model.
    """

    tensor: str
    """Name of the weight in the layer."""
    cls: str
    """Name of the layer's class."""
    shape: tuple[int, ...]
    """Logical shape of the weight, in which the bits are."""
    unit_dims: tuple[int, ...] = (0,)
    """The dimensions of ``shape`` that count output units."""
    dtype: str = "float32"
    """Of the weight in the model."""
    stored: tuple[int, ...] | None = None
    """The weight's shape in the model where that is not ``shape``."""
    scale: float | None = None
    """The scale that all units share; None if each has its own, in ``conv.weight.scale``."""
    cluster: int | None = None
    """Which settings its cluster had, if it had one."""


@dataclass(frozen=True)
class Contents:
    """What a packed file holds."""

    tensors: Mapping[str, Tensor]
    """Bits and scales of the binary layers; everything else under its state_dict key, as it is."""
    layers: Mapping[str, PackedLayer]
    """Layer name → description."""
    ties: Mapping[str, str]
    """State_dict key → the key that it shares its tensor with, which is the one that is stored."""
    clusters: tuple[Mapping[str, Any], ...] = ()
    """Settings that the layers' clusters had, as dicts; of an applied model."""


def write(contents: Contents, path: Path) -> None:
    """Write the file; it appears whole or not at all. Raises ImportError without safetensors."""
    header = {
        "sha256": _ZEROS.decode(),
        "format": FORMAT,
        "plugin": __version__,
        "bit_order": BIT_ORDER,
        "layers": {name: _brief(layer) for name, layer in contents.layers.items()},
        "ties": dict(contents.ties),
        "clusters": list(contents.clusters),
    }
    metadata = {"hbnn_plugin": json.dumps(header, separators=(",", ":"))}
    data = bytearray(_safetensors().save(dict(contents.tensors), metadata))
    at = data.index(_MARK) + len(_MARK)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    with beside(path) as temporary:
        temporary.write_bytes(data)


def read(path: Path) -> Contents:
    """The contents of a file that :func:`write` left.

    Raises:
        ValueError: the file is something else, of another format, or not to the last bit what was written.
        OSError: it cannot be read.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    data = path.read_bytes()
    at = data.find(_MARK) + len(_MARK)
    if at < len(_MARK):
        raise ValueError(f"{path} is not a packed file of hbnn_plugin, or its beginning is damaged")
    if hashlib.sha256(data[:at] + _ZEROS + data[at + 64 :]).hexdigest().encode() != data[at : at + 64]:
        raise ValueError(f"{path} is damaged: it is not what was written (its checksum differs)")
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8:end])["__metadata__"]["hbnn_plugin"])
        version, order = header["format"], header["bit_order"]
        if (version, order) == (FORMAT, BIT_ORDER):
            layers = {name: PackedLayer(**_with_tuples(entry)) for name, entry in header["layers"].items()}
            return Contents(safetensors.load(data), layers, dict(header["ties"]), tuple(header["clusters"]))
    except Exception as error:  # whatever a file may bring up that others have written, with the right checksum
        raise ValueError(f"{path} is not a packed file of hbnn_plugin: {type(error).__name__}: {error}") from error
    raise ValueError(
        f"{path} is of format {version!r} with bit order {order!r}; hbnn_plugin {__version__} reads format {FORMAT} "
        f"with bit order {BIT_ORDER!r}"
    )


def _brief(layer: PackedLayer) -> dict[str, Any]:
    return {f.name: value for f in fields(layer) if (value := getattr(layer, f.name)) != f.default}


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415  # an optional dependency
    except ImportError as error:
        raise ImportError("packed files need safetensors: pip install 'hbnn-plugin[packed]'") from error
    return safetensors.torch
