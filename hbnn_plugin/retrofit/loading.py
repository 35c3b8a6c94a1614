"""Load hooks: an applied model takes checkpoints of plain models and of both modes, strictly, and refuses misfits.

What does not fit is found before anything is loaded; the rest gets the keys of this model's mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cluster.epc import EPC, find
from ..cluster.inplace import InPlace, edited
from ..cluster.reference import set_reference
from ..geometry.dtypes import working_dtype
from .checkpoint import GEOMETRY, described, is_cluster_key, latent_keys, layer_of, mapped, places

__all__ = ["install_hooks", "remove_hooks"]


def install_hooks(root: nn.Module, layers: list[nn.Module]) -> None:
    """Let ``root``, and every part of it, refuse checkpoints that do not fit, and ``layers`` take those that do."""
    for part in root.modules():  # a backbone is often loaded by itself
        held = any(_hook_of(entry) is _refuse_misfits for entry in part._load_state_dict_pre_hooks.values())
        if not held and any(layer in layers for layer in part.modules()):
            part._register_load_state_dict_pre_hook(_refuse_misfits, with_module=True)
    for layer in layers:
        layer._register_load_state_dict_pre_hook(_accept, with_module=True)
        layer.register_load_state_dict_post_hook(_complete)


def remove_hooks(root: nn.Module) -> None:
    """Take all hooks of :func:`install_hooks` off again."""
    ours = (_refuse_misfits, _accept, _complete)
    for module in root.modules():
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, entry in hooks.items() if _hook_of(entry) in ours]:
                del hooks[key]


def _hook_of(entry: Any) -> Any:
    return getattr(entry, "hook", entry)


def _refuse_misfits(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    layers = [
        (name, f"{name}.".lstrip("."), tensor_name, epc)
        for name, layer in module.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False)
        for tensor_name, epc in find(layer).items()
    ]
    theirs = {key.removesuffix("_extra_state") for key in state_dict if key.endswith("._extra_state")}
    theirs = {place for place in theirs if place.startswith(prefix) and is_cluster_key(f"{place}point", state_dict)}
    ours = {place for _, inside, tensor_name, _ in layers for place in places(inside, tensor_name)}
    differences = [
        f"{name or epc.name}: {difference}"
        for name, inside, tensor_name, epc in layers
        for difference in _differences(epc, state_dict, inside, tensor_name, bool(theirs))
    ]
    strangers = sorted(layer_of(place) or "the layer" for place in theirs - ours)
    differences += [f"{name}: has a cluster in the checkpoint, none in the model" for name in strangers]
    if differences:
        mend = " (hbnn_plugin.plain_state_dict(checkpoint) has the weights without the clusters)" if theirs else ""
        raise ValueError(
            f"the checkpoint does not fit the clusters of {type(module).__name__}, and none of it was loaded there"
            f"{mend}:\n  " + "\n  ".join(differences)
        )


def _differences(epc: EPC, state_dict: dict[str, Any], prefix: str, tensor_name: str, applied: bool) -> Iterator[str]:
    """What keeps a checkpoint (an applied model's or not) from one layer's cluster."""
    listed, original = places(prefix, tensor_name)[0], latent_keys(prefix, tensor_name)[0]
    if isinstance(epc, InPlace) and original in state_dict:
        missing = [key for key in (f"{listed}_extra_state", f"{listed}point") if key not in state_dict]
        if missing:
            yield f"its cluster in the checkpoint has no {', no '.join(missing)}"
            return
    place = next((p for p in places(prefix, tensor_name) if f"{p}_extra_state" in state_dict), None)
    weight = state_dict.get(prefix + tensor_name)
    if place is not None:
        theirs, ours = described(state_dict[f"{place}_extra_state"]), described(epc.get_extra_state())
        assert ours is not None
        if theirs is None:
            state = state_dict[f"{place}_extra_state"]
            averaged = isinstance(state, Tensor) and state.is_floating_point()
            mend = "; of checkpoints that are averaged or cast, take the plain_state_dict first" if averaged else ""
            yield f"its cluster's settings in the checkpoint ({place}_extra_state) are damaged{mend}"
            return
        different = [key for key in GEOMETRY if theirs[key] != ours[key]]
        yield from (f"{key} is {theirs[key]!r} in the checkpoint, {ours[key]!r} in the model" for key in different)
        if "shape" in different:
            return
    elif weight is None:
        return  # torch names it, if the loading is strict
    elif applied:
        yield f"its {tensor_name} is plain in the checkpoint, has a cluster in the model"
    stored = state_dict.get(original, weight)
    if isinstance(stored, Tensor) and stored.shape != epc.parameter.shape:
        sizes = tuple(stored.shape), tuple(epc.parameter.shape)
        yield f"its {tensor_name} has the shape {sizes[0]} in the checkpoint, {sizes[1]} in the model"
    to_invert = place is None or not isinstance(epc, InPlace)
    if isinstance(weight, Tensor) and to_invert and not bool(weight.isfinite().all()):
        yield f"its {tensor_name} in the checkpoint holds non-finite values"


def _accept(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for tensor_name, epc in find(module).items():
        _translate(epc, state_dict, prefix, tensor_name)
        _fit_buffers(epc, state_dict, prefix, tensor_name)
        _adopt(epc, state_dict, prefix, tensor_name)


def _translate(epc: EPC, state_dict: dict[str, Any], prefix: str, tensor_name: str) -> None:
    """Give a cluster of the other mode the keys of this one."""
    listed, beside = places(prefix, tensor_name)
    original, latent = latent_keys(prefix, tensor_name)
    if isinstance(epc, InPlace) and original in state_dict:
        state_dict[prefix + tensor_name] = mapped(state_dict[original], state_dict, listed)
        state_dict[latent] = state_dict.pop(original)
        old, new = listed, beside
    elif not isinstance(epc, InPlace) and latent in state_dict:
        weight = state_dict.pop(prefix + tensor_name, None)
        epc.loaded_weight = None if weight is None else weight.detach()
        state_dict[original] = state_dict.pop(latent)
        old, new = beside, listed
    else:
        return
    for key in [key for key in state_dict if key.startswith(old)]:
        state_dict[new + key.removeprefix(old)] = state_dict.pop(key)


def _fit_buffers(epc: EPC, state_dict: dict[str, Any], prefix: str, tensor_name: str) -> None:
    """Of a checkpoint in half precision the points become float32 (``assign=True`` would take them as they are).

    Of one with other settings a momentum that is not used goes, and one that is not there is 0: every rule has its own
    meaning, and size, of it.
    """
    place = places(prefix, tensor_name)[isinstance(epc, InPlace)]
    latent = latent_keys(prefix, tensor_name)[isinstance(epc, InPlace)]
    for key, value in state_dict.items():
        if key.startswith(place) and key != latent and value.is_floating_point():
            state_dict[key] = value.to(working_dtype(value.dtype))
    theirs = described(state_dict.get(f"{place}_extra_state"))
    if theirs is None:
        return
    other_rule = theirs.get("rule") != epc.settings.rule
    if other_rule or epc.momentum is None:
        state_dict.pop(f"{place}momentum", None)
    other = other_rule or theirs.get("point_momentum") != epc.settings.point_momentum
    if other and epc.momentum is not None and f"{place}point" in state_dict:
        state_dict.setdefault(f"{place}momentum", torch.zeros_like(state_dict[f"{place}point"]))


def _adopt(epc: EPC, state_dict: dict[str, Any], prefix: str, tensor_name: str) -> None:
    """Let a plain weight, if there is one, load as if apply had been called on a model that held it."""
    place = places(prefix, tensor_name)[isinstance(epc, InPlace)]
    latent_key = latent_keys(prefix, tensor_name)[isinstance(epc, InPlace)]
    weight = state_dict.get(prefix + tensor_name)
    if weight is None or latent_key in state_dict or weight.shape != epc.parameter.shape:
        return
    weight = weight.detach().to(epc.parameter.dtype)
    fresh = type(epc)(weight, epc.settings, shape=epc.shape, unit_dims=epc.unit_dims, name=epc.name)
    latent, outside = fresh.latent_of(weight)
    if outside and epc.settings.space == "ball":
        fresh.warn_of_lengths(outside)
    state_dict.update(fresh.state_dict(prefix=place))
    state_dict[latent_key] = latent
    if isinstance(epc, InPlace):
        state_dict[prefix + tensor_name] = fresh.weight_of(latent)
    else:
        del state_dict[prefix + tensor_name]
    epc.reference_is_stale = True


def _complete(module: nn.Module, _: Any) -> None:
    for tensor_name, epc in find(module).items():
        weight, epc.loaded_weight = epc.loaded_weight, None
        stale, epc.reference_is_stale = epc.reference_is_stale, False
        if epc.parameter.is_meta:  # nothing was loaded there, as torch has said
            continue
        if weight is not None:  # of a host that may have edited it since the last step
            with torch.no_grad():
                weight, now = weight.to(epc.parameter), getattr(module, tensor_name)
            if bool(edited(epc.logical(weight), epc.logical(now), epc.dims).any()):
                setattr(module, tensor_name, weight)
        if stale:
            set_reference(module, tensor_name, epc)
