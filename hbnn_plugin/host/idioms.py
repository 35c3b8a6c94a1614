"""What host code does to its weight behind autograd's back, and a parametrization would lose.

Old binary codebases assign ``self.weight.data`` in every forward, keep ``weight.org``, look at ``weight.grad``, or let
their trainer swap real and binary values around each step. Under a parametrization the weight is computed anew at every
read, has no gradient, and such edits land in a tensor that nobody sees again; in in-place mode they work as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bits import is_two_valued
from .convolved import convolved_weight, edits_its_weight
from .selection import LIBRARIES, Selected, names_in_methods, own_class

__all__ = ["held_elsewhere", "loads_by_itself", "reason_for_inplace"]

_CONTAINERS = (list, tuple, dict, set)
_NESTED = 4
"""How deep in containers a weight is looked for, an object's ``__dict__`` being one."""


def reason_for_inplace(layers: Sequence[Selected], binarized_later: bool = False) -> str | None:
    """Why some layer needs in-place mode; None if none of them does.

    ``binarized_later``: the layers are of a full-precision model that is about to be binarized.
    """
    for layer in layers:
        attributes = sorted(vars(layer.weight)) if isinstance(layer.weight, nn.Parameter) else []
        if attributes:
            return f"{layer.label} keeps .{attributes[0]} on its weight"
        edits = edits_its_weight(layer.module, layer.shape, layer.weight)
        named = names_in_methods(own_class(layer.module))
        if edits:
            return f"{layer.label} edits its weight in its forward"
        if edits is None and "data" in named:
            return (
                f"{layer.label} could not be run to see whether it edits its weight, and mentions .data in its methods"
            )
        if "grad" in named:
            return f"{layer.label} looks at a .grad in its methods"
        if _notices_subclasses(own_class(layer.module)):
            return f"{layer.label} is of a class with an __init_subclass__, and a parametrization makes a subclass"
    for label, owner in held_elsewhere(layers).items():
        return f"{label} has its weight held by a {owner} too"
    if not binarized_later:
        for layer in layers:
            if _convolves_as_it_is(layer):
                return f"{layer.label} convolves with its weight as it is, so that your trainer has to make it binary"
    return None


def loads_by_itself(model: nn.Module, layers: Sequence[Selected]) -> str | None:
    """Which module around a layer overrides ``load_state_dict``: it would not know the keys of a parametrization."""
    inside = {id(layer.module) for layer in layers}
    for name, module in model.named_modules():
        cls = next(c for c in type(module).__mro__ if "load_state_dict" in vars(c))
        if cls.__module__.split(".")[0] not in LIBRARIES and any(id(m) in inside for m in module.modules()):
            return f"{name or own_class(module).__name__} has a load_state_dict of its own"
    return None


def _notices_subclasses(cls: type) -> bool:
    passive = {"builtins", "typing", "abc", *LIBRARIES}
    return any("__init_subclass__" in vars(c) for c in cls.__mro__ if c.__module__.split(".")[0] not in passive)


def _convolves_as_it_is(layer: Selected) -> bool:
    """Whether the forward takes a weight of many values as it is, so that nobody but the trainer can make it binary."""
    convolved = convolved_weight(layer.module, layer.shape, layer.weight)
    if convolved is None or not torch.equal(convolved.flatten(), layer.weight.detach().flatten()):
        return False
    return not is_two_valued(convolved.reshape(layer.shape), layer.unit_dims)


def held_elsewhere(layers: Sequence[Selected]) -> dict[str, str]:
    """Layer → class of an object of the user's own, neither a module nor an optimizer, that holds its weight."""
    if not layers:
        return {}
    labels: dict[int, set[str]] = {}
    for layer in layers:
        labels.setdefault(id(layer.weight), set()).add(layer.label)
    owners: dict[str, str] = {}
    level: list[Any] = [layer.weight for layer in layers]
    ours = {id(level), id(labels), id(layers)}
    for _ in range(_NESTED):
        referrers = [r for r in gc.get_referrers(*level) if id(r) not in ours and id(r) not in labels]
        ours.add(id(referrers))
        found: list[Any] = []
        ours.add(id(found))
        for referrer in referrers:
            held = set().union(*(labels.get(id(r), ()) for r in gc.get_referents(referrer)))
            if _is_namespace(referrer):
                continue
            if held and isinstance(referrer, _CONTAINERS) and not isinstance(referrer, Selected):
                labels[id(referrer)] = held
                found.append(referrer)
            elif held and _is_foreign(referrer):
                owners.update(dict.fromkeys(held, type(referrer).__name__))
        level = found
        if not level:
            break
    return {layer.label: owners[layer.label] for layer in layers if layer.label in owners}


def _is_namespace(referrer: object) -> bool:
    """Whether these are the globals of a script or a notebook, whose variables edit nothing."""
    return isinstance(referrer, dict) and "__builtins__" in referrer


def _is_foreign(owner: object) -> bool:
    if isinstance(owner, (nn.Module, Optimizer, Tensor, type)):
        return False
    return type(owner).__module__.split(".")[0] not in {"builtins", "types", "functools", "hbnn_plugin", *LIBRARIES}
