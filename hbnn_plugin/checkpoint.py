"""Checkpoints of plain and of applied models, each loadable into the other; between the modes by way of a plain one.

An applied layer's keys are ``<layer>.parametrizations.<tensor>.original`` (the latent) and ``...<tensor>.0.*`` (the
cluster); in in-place mode the host's own, and ``<layer>.<tensor>_epc.*`` (the cluster, with the latent). Load hooks let
an applied model take a plain checkpoint, strictly; :func:`plain_state_dict` turns an applied model's checkpoint into
the host's own keys.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cluster import INPLACE_SUFFIX, find
from .epc import exp_map
from .flips import set_reference
from .settings import Settings

__all__ = ["install_hooks", "plain_state_dict", "remove_hooks"]

_GEOMETRY = ("space", "radius", "per", "relative", "shape", "dims")
"""What has to be the same for a checkpoint's latents and points to mean the same weights."""

_LATENT_KEY = re.compile(r"^(?P<prefix>(?:.*\.)?)parametrizations\.(?P<tensor>[^.]+)\.original$")


def install_hooks(root: nn.Module, layers: list[nn.Module]) -> None:
    """Let ``root``, and every part of it, refuse checkpoints of other clusters, and ``layers`` take plain ones."""
    for part in root.modules():  # a backbone is often loaded by itself
        held = any(_hook_of(entry) is _refuse_other_clusters for entry in part._load_state_dict_pre_hooks.values())
        if not held and any(layer in layers for layer in part.modules()):
            part._register_load_state_dict_pre_hook(_refuse_other_clusters, with_module=True)
    for layer in layers:
        layer._register_load_state_dict_pre_hook(_accept_plain, with_module=True)
        layer.register_load_state_dict_post_hook(_renew_reference)


def remove_hooks(root: nn.Module) -> None:
    """Take all hooks of :func:`install_hooks` off again."""
    ours = (_refuse_other_clusters, _accept_plain, _renew_reference)
    for module in root.modules():
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, entry in hooks.items() if _hook_of(entry) in ours]:
                del hooks[key]


def _hook_of(entry: Any) -> Any:
    return getattr(entry, "hook", entry)


def _described(state: Tensor) -> dict[str, Any]:
    end = int((state == 0).nonzero()[0])
    described: dict[str, Any] = json.loads(bytes(state[:end].tolist()))
    return described


def _refuse_other_clusters(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    differences = []
    for name, layer in module.named_modules(prefix=prefix.rstrip(".")):
        for tensor_name, epc in find(layer).items():
            places = (f"parametrizations.{tensor_name}.0", tensor_name + INPLACE_SUFFIX)
            states = [state_dict.get(f"{name}.{place}._extra_state".lstrip(".")) for place in places]
            state = next((state for state in states if state is not None), None)
            if state is None:
                plain = state_dict.get(f"{name}.{tensor_name}".lstrip("."))
                if isinstance(plain, Tensor) and not bool(plain.isfinite().all()):
                    differences.append(f"{name}: its {tensor_name} in the checkpoint holds non-finite values")
                continue
            theirs, ours = _described(state), _described(epc.get_extra_state())
            differences += [
                f"{name}: {key} is {theirs.get(key)!r} in the checkpoint, {ours[key]!r} in the model"
                for key in _GEOMETRY
                if theirs.get(key) != ours[key]
            ]
    if differences:
        raise ValueError(
            f"the checkpoint does not fit the clusters of {type(module).__name__}, and none of it was loaded there:\n  "
            + "\n  ".join(differences)
        )


def _accept_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for tensor_name, epc in find(module).items():
        epc.adopt(state_dict, prefix, tensor_name)


def _renew_reference(module: nn.Module, _: Any) -> None:
    for tensor_name, epc in find(module).items():
        if epc.reference_is_stale:
            epc.reference_is_stale = False
            set_reference(module, tensor_name, epc)


@torch.no_grad()
def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An applied model's state_dict under the host's own keys, for loading, strictly, into a plain model.

    Args:
        state_dict: of an applied model (a plain one passes unchanged). Not modified.

    Returns:
        A new dict; tensors that needed no mapping are shared.
    """
    plain: OrderedDict[str, Any] = OrderedDict()
    for key, value in state_dict.items():
        match = _LATENT_KEY.match(key)
        inside = f"{key.removesuffix('original')}0."
        if match and inside + "_extra_state" in state_dict and inside + "point" in state_dict:
            plain[match["prefix"] + match["tensor"]] = _mapped(value, state_dict, inside)
        elif not _is_cluster_key(key, state_dict):
            plain[key] = value
    if hasattr(state_dict, "_metadata"):  # the versions that modules load by
        plain._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return plain


def _is_cluster_key(key: str, state_dict: Mapping[str, Any]) -> bool:
    match = re.match(rf"^(.*parametrizations\.[^.]+\.0\.|.*{INPLACE_SUFFIX}\.)[^.]+$", key)
    return match is not None and match[1] + "_extra_state" in state_dict and match[1] + "point" in state_dict


def _mapped(latent: Tensor, state_dict: Mapping[str, Any], inside: str) -> Tensor:
    described = _described(state_dict[inside + "_extra_state"])
    names = Settings.__dataclass_fields__
    settings = Settings(**{key: value for key, value in described.items() if key in names})
    radius: float | Tensor = settings.radius
    if settings.relative:
        radius = radius / state_dict[inside + "scale"].double() ** 2
    point = state_dict[inside + "point"]
    v = latent.detach().reshape(described["shape"])
    return exp_map(point, v, radius, settings.geometry, tuple(described["dims"])).reshape(latent.shape)
