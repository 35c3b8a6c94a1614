"""One forward of a model: the maps of all its layers worked out together.

A map's scalars are some hundred operations on one number a point. Layer by layer they would be most of the plugin's
cost in a small network, and most of its kernels on a GPU; over all layers at once they cost what one layer's cost.

This lasts from the beginning of the model's forward to its end, for as long as the latent is what it was. Any other
read works its own map out: between two forwards a latent may change unseen (``.data`` edits bump no version), and what
is kept from step to step could be stale.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..geometry.joint_maps import exp_maps
from ..geometry.looking import traced
from .parametrization import Parametrized

__all__ = ["install_batching", "remove_batching"]


def install_batching(model: nn.Module) -> None:
    """From now on ``model(...)`` works out the maps of the layers inside together."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile: what is inside is traced
    if _map_all in model._forward_pre_hooks.values():
        return
    model.register_forward_pre_hook(_map_all)
    model.register_forward_hook(_forget_all, always_call=True)  # also when it raises


def remove_batching(model: nn.Module) -> None:
    """Undo :func:`install_batching`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_map_all, _forget_all)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _map_all(model: nn.Module, _: Any) -> None:
    if traced():  # a compiler fuses the scalars itself
        return
    clusters = [epc for epc in _clusters(model) if epc.can_precompute]
    for epc, mapped in zip(clusters, exp_maps([epc.map_of(epc.parameter.detach()) for epc in clusters])):
        epc.precompute(mapped)


def _forget_all(model: nn.Module, *_: Any) -> None:
    if not traced():
        for epc in _clusters(model):
            epc.precomputed = None


def _clusters(model: nn.Module) -> list[Parametrized]:
    return [module for module in model.modules() if isinstance(module, Parametrized)]
