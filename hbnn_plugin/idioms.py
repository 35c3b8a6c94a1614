"""What host code does to its weight behind autograd's back, and a parametrization would lose.

Old binary codebases assign ``self.weight.data`` in every forward, keep ``weight.org``, or hand the Parameter to an
object that swaps its values around each step. Under a parametrization the weight is computed anew at every read, and
such edits land in a tensor that nobody sees again; in in-place mode they work as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .convolved import edits_its_weight
from .selection import LIBRARIES, Selected

__all__ = ["reason_for_inplace"]

_CONTAINERS = (list, tuple, dict, set)
_NESTED = 4
"""How deep in containers a weight is looked for, an object's ``__dict__`` being one."""


def reason_for_inplace(layers: Sequence[Selected]) -> str | None:
    """Why some layer needs in-place mode; None if none of them does."""
    for layer in layers:
        attributes = sorted(vars(layer.weight)) if isinstance(layer.weight, nn.Parameter) else []
        if attributes:
            return f"{layer.label} keeps .{attributes[0]} on its weight"
        if edits_its_weight(layer.module, layer.shape, layer.weight):
            return f"{layer.label} edits its weight in its forward"
    return _held_elsewhere(layers)


def _held_elsewhere(layers: Sequence[Selected]) -> str | None:
    """Whether an object of the user's own, neither a module nor an optimizer, holds one of the weights."""
    labels = {id(layer.weight): layer.label for layer in layers}
    level: list[Any] = [layer.weight for layer in layers]
    ours = {id(level), id(labels), id(layers)}
    for _ in range(_NESTED):
        referrers = [r for r in gc.get_referrers(*level) if id(r) not in ours and id(r) not in labels]
        ours.add(id(referrers))
        found: list[Any] = []
        ours.add(id(found))
        for referrer in referrers:
            label = next((labels[id(r)] for r in gc.get_referents(referrer) if id(r) in labels), None)
            if label is None:
                continue
            if isinstance(referrer, _CONTAINERS) and not isinstance(referrer, Selected):
                labels[id(referrer)] = label
                found.append(referrer)
            elif _is_foreign(referrer):
                return f"{label} has its weight held by a {type(referrer).__name__} too"
        level = found
        if not level:
            break
    return None


def _is_foreign(owner: object) -> bool:
    if isinstance(owner, (nn.Module, Optimizer, Tensor, type)):
        return False
    return type(owner).__module__.split(".")[0] not in {"builtins", "types", "functools", "hbnn_plugin", *LIBRARIES}
