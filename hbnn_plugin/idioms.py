"""What host code does to its weight behind autograd's back, and a parametrization would lose.

Old binary codebases assign ``self.weight.data`` in every forward, keep ``weight.org``, or hand the Parameter to an
object that swaps its values around each step. Under a parametrization the weight is computed anew at every read, and
such edits land in a tensor that nobody sees again; in in-place mode they work as ever.
"""

from __future__ import annotations

import dis
import gc
import re
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .selection import Selected, own_class

__all__ = ["reason_for_inplace"]

_IN_PLACE_METHOD = re.compile(r"[a-z0-9_]*[a-z0-9]_$")


def reason_for_inplace(layer: Selected) -> str | None:
    """Why the layer needs in-place mode, as the end of a sentence that begins with its name; None if it does not."""
    weight = layer.weight
    attributes = sorted(vars(weight)) if isinstance(weight, nn.Parameter) else []
    if attributes:
        return f"keeps .{attributes[0]} on its weight"
    edit = _edit_in(own_class(layer.module), layer.tensor_name)
    if edit is not None:
        return f"edits its weight in {edit}"
    holder = _holder_of(weight, layer.module)
    if holder is not None:
        return f"has its weight held by a {holder} too"
    return None


def _edit_in(cls: type, tensor_name: str) -> str | None:
    """The method of the class, or of a base of the host's own, that writes into the weight."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "torch" or base is object:
            continue
        for name, method in vars(base).items():
            code = getattr(method, "__code__", None)
            if name != "__init__" and code is not None and any(_edits(part, tensor_name) for part in _nested(code)):
                return f"{base.__name__}.{name}"
    return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _edits(code: CodeType, tensor_name: str) -> bool:
    """Whether the code assigns an attribute of the weight, or calls a method on it, or its data, that ends in _."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        name = str(instruction.argval)
        if instruction.opname == "STORE_ATTR":
            if chain and chain[-1] == tensor_name:
                return True
            chain = []
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            on_weight = bool(chain) and chain[-1] in (tensor_name, "data") and tensor_name in chain
            if on_weight and _IN_PLACE_METHOD.fullmatch(name) and name != "requires_grad_":
                return True
            chain.append(name)
        elif not instruction.opname.startswith(("CACHE", "EXTENDED_ARG")):
            chain = []
    return False


def _holder_of(weight: Tensor, module: nn.Module) -> str | None:
    """The class of an object, neither a module nor an optimizer, that holds the Parameter in an attribute or a list."""
    for container in gc.get_referrers(weight):
        if isinstance(container, (FrameType, Tensor)) or container is module._parameters:
            continue
        if isinstance(container, (list, tuple, dict, set)):
            for owner in gc.get_referrers(container):
                name = _foreign(owner, container)
                if name is not None:
                    return name
        else:
            name = _foreign(container, None)
            if name is not None:
                return name
    return None


def _foreign(owner: Any, container: Any) -> str | None:
    if isinstance(owner, dict) and not isinstance(container, dict):
        holders = [o for o in gc.get_referrers(owner) if getattr(o, "__dict__", None) is owner]
        owner = holders[0] if holders else None
    known = (nn.Module, Optimizer, FrameType, type, Tensor, list, tuple, dict, set)
    if owner is None or isinstance(owner, known) or not hasattr(owner, "__dict__"):
        return None
    module = type(owner).__module__.split(".")[0]
    return None if module in ("builtins", "torch", "hbnn_plugin", "types") else type(owner).__name__
