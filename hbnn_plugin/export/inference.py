"""A layer that convolves with the binary weight that it was given, whatever its own forward makes of its weight.

Hosts binarize anew in every forward: IR-Net from the filter's mean and deviation, SiMaN from its median. No stored
±scale comes out of that again as it went in. So the layer's own forward runs as it is, with one change: the convolution
in it gets the stored weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..host.bits import by_unit
from ..host.convolved import CONVOLUTIONS, edits_its_weight
from ..host.selection import Selected

__all__ = ["hold", "is_held", "release"]


class _Convolving(TorchFunctionMode):
    """Inside, convolutions and linear maps with a weight of ``binary``'s size take ``binary``."""

    def __init__(self, binary: Tensor) -> None:
        super().__init__()
        self.binary = binary

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in CONVOLUTIONS:
            given = args[1] if len(args) > 1 else kwargs["weight"]
            if given.numel() == self.binary.numel():
                weight = self.binary.reshape(given.shape).to(given.dtype)
                if len(args) > 1:
                    args = (args[0], weight, *args[2:])
                else:
                    kwargs["weight"] = weight
        return func(*args, **kwargs)


def _forward(module: nn.Module, name: str, tensor_name: str, edits: bool, /, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, convolving with its weight as it is."""
    if module.training:
        raise RuntimeError(
            f"{name}: it was loaded from a packed file, which holds no latent weight to train; call model.eval(), or "
            "train from a checkpoint"
        )
    weight: nn.Parameter = getattr(module, tensor_name)
    if edits:  # it gets a copy to edit
        module._parameters[tensor_name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    try:
        with _Convolving(weight):
            return type(module).forward(module, *args, **kwargs)
    finally:
        if edits:
            module._parameters[tensor_name] = weight


def hold(layer: Selected) -> None:
    """Let the layer convolve with its weight Parameter as it is, from now on, in evaluation mode.

    Its forward becomes one that raises RuntimeError in training mode. Class, keys and everything else stay, and it
    can be copied, pickled, exported and compiled as before. The weight takes no gradient any more. Loading a
    real-valued weight into the layer, such as from a checkpoint of training, undoes all that.
    """
    module = layer.module
    release(module)
    edits = bool(edits_its_weight(module, layer.shape, layer.weight))
    layer.weight.requires_grad_(False)
    module.forward = partial(_forward, module, layer.label, layer.tensor_name, edits)
    module._register_load_state_dict_pre_hook(
        partial(_take, layer.tensor_name, layer.shape, layer.unit_dims), with_module=True
    )


def is_held(module: nn.Module) -> bool:
    """Whether :func:`hold` was called on it."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def release(module: nn.Module) -> None:
    """Undo :func:`hold`, if it was called on this layer; its weight stays."""
    if is_held(module):
        del vars(module)["forward"]
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, entry in hooks.items() if getattr(getattr(entry, "hook", None), "func", None) is _take]:
        del hooks[key]


def _take(
    tensor_name: str,
    shape: tuple[int, ...],
    unit_dims: tuple[int, ...],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Before a checkpoint is loaded: a held layer would convolve with a latent weight as it is."""
    weight, here = state_dict.get(prefix + tensor_name), getattr(module, tensor_name)
    if not is_held(module) or not isinstance(weight, Tensor) or weight.shape != here.shape:
        return
    rows = by_unit(weight.detach().reshape(shape), unit_dims).abs()
    if not torch.equal(rows.amin(1), rows.amax(1)):
        del vars(module)["forward"]  # the hook stays: torch is running through the hooks
        here.requires_grad_(True)
