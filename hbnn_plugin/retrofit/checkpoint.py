"""What stands in checkpoints of applied models, and :func:`plain_state_dict`, which makes them the host's own.

An applied layer's keys are ``<layer>.parametrizations.<tensor>.original`` (the latent) and ``...<tensor>.0.*`` (the
cluster); in in-place mode the host's own, and ``<layer>.<tensor>_epc.*`` (the cluster, with the latent).
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cluster.epc import INPLACE_SUFFIX, own_radius
from ..cluster.settings import SPACES
from ..geometry.exponential import exp_map

__all__ = [
    "GEOMETRY",
    "described",
    "holds_clusters",
    "is_cluster_key",
    "latent_keys",
    "layer_of",
    "mapped",
    "places",
    "plain_state_dict",
]

GEOMETRY = ("space", "radius", "per", "relative", "shape", "dims")
"""What has to be the same for a checkpoint's latents and points to mean the same weights."""

_PLACE = re.compile(rf"(?:(?<![^.])parametrizations\.[^.]+\.0|[^.]+{INPLACE_SUFFIX})\.$")
"""What stands between a layer's name and the names of its cluster's entries."""

_LATENT_KEY = re.compile(r"^(?P<prefix>(?:.*\.)?)parametrizations\.(?P<tensor>[^.]+)\.original$")


def places(prefix: str, tensor_name: str) -> tuple[str, str]:
    """What the keys of a layer's cluster begin with: under a parametrization, and in in-place mode."""
    return f"{prefix}parametrizations.{tensor_name}.0.", f"{prefix}{tensor_name}{INPLACE_SUFFIX}."


def latent_keys(prefix: str, tensor_name: str) -> tuple[str, str]:
    """A layer's latent's key: under a parametrization, and in in-place mode."""
    listed, beside = places(prefix, tensor_name)
    return f"{listed.removesuffix('0.')}original", f"{beside}latent"


def layer_of(place: str) -> str:
    """The name of the layer whose cluster's keys begin with ``place``."""
    return _PLACE.sub("", place).rstrip(".")


def is_cluster_key(key: str, state_dict: Mapping[str, Any]) -> bool:
    """Whether this is the key of an entry of a cluster."""
    place = key[: key.rfind(".") + 1]
    return bool(_PLACE.search(place)) and {f"{place}_extra_state", f"{place}point"} <= state_dict.keys()


def holds_clusters(content: object) -> bool:
    """Whether this is an applied model's state_dict, not something around it."""
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(key, str) and is_cluster_key(key, content) for key in content)


def described(state: Any) -> dict[str, Any] | None:
    """The settings and the layout in a cluster's extra state (:meth:`EPC.get_extra_state`); None if it is damaged."""
    if not (isinstance(state, Tensor) and state.dtype == torch.uint8 and not bool(state.all())):
        return None
    end = int((state == 0).nonzero()[0])
    try:
        found: dict[str, Any] = json.loads(bytes(state[:end].tolist()))
        fits = (math.prod(found["shape"]) + 7) // 8 == state.numel() - end - 1
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if fits and found.keys() >= set(GEOMETRY) else None


@torch.no_grad()
def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An applied model's state_dict under the host's own keys, for loading, strictly, into a plain model.

    Args:
        state_dict: of an applied model (a plain one passes unchanged). Not modified.

    Returns:
        A new dict; tensors that needed no mapping are shared.

    Raises:
        ValueError: it is a checkpoint that holds such a state_dict, not the state_dict itself; a cluster is damaged.
    """
    for key, value in state_dict.items():
        if holds_clusters(value):
            raise ValueError(f"this holds an applied model's state_dict under {key!r}: pass checkpoint[{key!r}]")
    plain: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        match = _LATENT_KEY.match(key)
        inside = f"{key.removesuffix('original')}0."
        if match and inside + "_extra_state" in state_dict and inside + "point" in state_dict:
            plain[match["prefix"] + match["tensor"]] = mapped(value, state_dict, inside)
        elif not is_cluster_key(key, state_dict):
            plain[key] = value
    if hasattr(state_dict, "_metadata"):  # the versions that modules load by
        plain._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return plain


def mapped(latent: Tensor, state_dict: Mapping[str, Any], inside: str) -> Tensor:
    """The weight of a latent, by the cluster whose keys in the checkpoint begin with ``inside``."""
    layout = described(state_dict[inside + "_extra_state"])
    if layout is None:
        raise ValueError(f"a cluster's settings in the checkpoint ({inside}_extra_state) are damaged")
    radius = own_radius(layout["radius"], state_dict[inside + "scale"] if layout["relative"] else None)
    point = state_dict[inside + "point"]
    v = latent.detach().reshape(layout["shape"])
    return exp_map(point, v, radius, SPACES[layout["space"]], tuple(layout["dims"])).reshape(latent.shape)
