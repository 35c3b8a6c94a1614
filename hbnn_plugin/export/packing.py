"""Between a plain model and what a packed file holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..cluster.settings import Settings
from ..host.bits import pack_bits, unpack_bits
from ..host.selection import own_class
from .capture import BinaryWeight, signed
from .container import Contents, PackedLayer

__all__ = ["no_values", "pack", "ties", "unpack"]


def pack(plain: nn.Module, binary: Mapping[str, BinaryWeight], settings: Mapping[str, Settings]) -> Contents:
    """One bit a binary weight, everything else as it is; tied tensors once.

    Args:
        plain: a model without clusters.
        binary: its binary layers, by name.
        settings: what the clusters were made with that it had, by name of their layer.

    Raises:
        ValueError: there is something that a file cannot hold; all of it is named.
    """
    state = plain.state_dict(keep_vars=True)
    tied = ties(state)
    weights = {id(_parameter(seen)): seen for seen in binary.values()}
    problems = list(_problems(plain, state, binary, weights))
    if problems:
        raise ValueError("the model cannot be packed:\n  " + "\n  ".join(problems))
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        seen = weights.get(id(value))
        if key in tied:
            continue
        if seen is None:
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            tensors[f"{key}.bits"] = pack_bits(seen.bits)
            if not _uniform(seen.scale):
                tensors[f"{key}.scale"] = seen.scale
    different = list(dict.fromkeys(settings.values()))
    places = {name: different.index(one) for name, one in settings.items()}
    layers = {name: _described(seen, places.get(name)) for name, seen in binary.items()}
    return Contents(tensors, layers, tied, tuple(asdict(one) for one in different))


def _described(seen: BinaryWeight, cluster: int | None) -> PackedLayer:
    layer, weight = seen.layer, seen.layer.weight
    return PackedLayer(
        tensor=layer.tensor_name,
        cls=own_class(layer.module).__name__,
        shape=layer.shape,
        unit_dims=layer.unit_dims,
        dtype=str(weight.dtype).removeprefix("torch."),
        stored=tuple(weight.shape) if tuple(weight.shape) != layer.shape else None,
        scale=seen.scale[0].item() if _uniform(seen.scale) else None,
        cluster=cluster,
    )


def _uniform(scale: Tensor) -> bool:
    return bool((scale == scale[0]).all())


def unpack(contents: Contents) -> dict[str, Tensor]:
    """The whole state_dict, with ±scale as the weight of each binary layer, in its shape and dtype in the model.

    Raises some exception if the contents contradict themselves.
    """
    state = dict(contents.tensors)
    for name, layer in contents.layers.items():
        key = f"{name}.{layer.tensor}".lstrip(".")
        if key in contents.ties:
            continue
        packed = state.pop(f"{key}.bits")
        scale = (
            state.pop(f"{key}.scale")
            if layer.scale is None
            else torch.tensor([layer.scale], dtype=torch.float64, device="cpu")
        )
        bits = unpack_bits(packed, torch.Size(layer.shape).numel()).reshape(layer.shape)
        dtype: torch.dtype = getattr(torch, layer.dtype)
        state[key] = signed(bits, scale, layer.unit_dims).reshape(layer.stored or layer.shape).to(dtype)
    return {**state, **{key: state[kept] for key, kept in contents.ties.items()}}


def ties(state: Mapping[str, Any]) -> dict[str, str]:
    """State_dict key → the first key that holds the very same tensor (``state_dict(keep_vars=True)``)."""
    first: dict[int, str] = {}
    return {key: kept for key, value in state.items() if (kept := first.setdefault(id(value), key)) != key}


def no_values(entry: Any) -> bool:
    """Whether a state_dict's entry is no tensor, or one without values."""
    return not isinstance(entry, Tensor) or is_lazy(entry) or entry.is_meta


def _parameter(seen: BinaryWeight) -> nn.Parameter | None:
    return seen.layer.module._parameters.get(seen.layer.tensor_name)


def _problems(
    plain: nn.Module, state: Mapping[str, Any], binary: Mapping[str, BinaryWeight], weights: Mapping[int, BinaryWeight]
) -> Iterator[str]:
    for key, value in state.items():
        if no_values(value):
            yield f"{key} ({type(value).__name__}) is no tensor with values"
    for seen in binary.values():
        first = weights[id(_parameter(seen))]
        if _parameter(seen) is None:
            yield f"{seen.layer.label}: its weight is parametrized; remove that parametrization first"
        elif not torch.equal(first.value.flatten(), seen.value.flatten()):
            yield f"{seen.layer.label} and {first.layer.label} share a weight and make different binary weights of it"
    tensor_names = {id(seen.layer.module): seen.layer.tensor_name for seen in binary.values()}
    binary_keys = {
        f"{name}.{tensor_names[id(module)]}".lstrip(".")
        for name, module in plain.named_modules(remove_duplicate=False)
        if id(module) in tensor_names
    }
    for key, value in state.items():
        if id(value) in weights and key not in binary_keys:
            yield f"{weights[id(value)].layer.label}: its weight is also {key}, which is not binary"
