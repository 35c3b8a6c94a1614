"""Back to a plain model: same outputs, the host's own classes and keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import nn

from .binarize import fuse_binarized
from .checkpoint import remove_hooks
from .flips import applied_layers

__all__ = ["fuse"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def fuse(model: M) -> M:
    """Make an applied model plain again, in place, and return it.

    Every weight becomes exp_p(v) as it is now, in the very Parameter object that held the latent (optimizers and ties
    keep it), under the host's own state_dict keys, in the host's own classes. Layers that ``binarize`` made come to
    hold their ±scale as weight, in ``nn.Conv2d``, behind a small sign module where activations are binary.

    Fusing a deepcopy leaves the original working.

    Raises:
        ValueError: the model was never applied, is fused already, or a weight is not finite (named; nothing is
            changed).
    """
    layers = applied_layers(model)
    for name, (module, tensor_name, epc) in layers.items():
        bad = int((~getattr(module, tensor_name).isfinite()).sum())
        if bad:
            raise ValueError(f"{name}: its weight holds {bad} non-finite value(s); nothing was fused")
        if sum(other is epc for _, _, other in layers.values()) < epc.layers:
            raise ValueError(f"{name}: its weight is tied to a layer outside of this model; fuse the whole model")
    weights = {id(epc): getattr(module, tensor_name).clone() for module, tensor_name, epc in layers.values()}
    latents = {id(epc): epc.latent for _, _, epc in layers.values()}
    for module, tensor_name, epc in layers.values():
        epc.owner = None  # no optimizer step is to find this cluster any more
        latents[id(epc)].data = weights[id(epc)]
        _remove_parametrization(module, tensor_name)
        _restore_parameter(module, tensor_name, latents[id(epc)])
    remove_hooks(model)
    fuse_binarized(model)
    return model


def _remove_parametrization(module: nn.Module, tensor_name: str) -> None:
    """Unlike torch's remove_parametrizations, leave the injected class, which deepcopies share, as it is."""
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    del lists[tensor_name]
    injected = type(module)
    if len(lists) == 0:
        del module.parametrizations
        module.__class__ = injected.__bases__[0]
    else:  # others are parametrized by somebody else: a class like the injected one without our property
        rest = {k: v for k, v in vars(injected).items() if k not in (tensor_name, "__dict__", "__weakref__")}
        module.__class__ = type(injected.__name__, injected.__bases__, rest)


def _restore_parameter(module: nn.Module, tensor_name: str, parameter: nn.Parameter) -> None:
    """Register the parameter where torch's layers have it: first, in front of the bias."""
    parameters = OrderedDict([(tensor_name, parameter), *module._parameters.items()])
    module._parameters.clear()
    module._parameters.update(parameters)
