"""Back to a plain model: same outputs, the host's own classes and keys."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ..cluster.batching import remove_batching
from ..cluster.epc import EPC, applied_layers
from ..host.sharding import is_sharded
from .binarize import fuse_binarized
from .loading import remove_hooks

__all__ = ["fuse"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def fuse(model: M) -> M:
    """Make an applied model plain again, in place, and return it.

    Every weight becomes exp_p(v) as it is now, in the very Parameter object that held the latent (optimizers and ties
    keep it), under the host's own state_dict keys, in the host's own classes. Layers that ``binarize`` made come to
    hold their ±scale as weight, in ``nn.Conv2d``, behind a small sign module where activations are binary; the
    ``nn.Hardtanh`` that it put in the place of ``nn.ReLU`` stay.

    Fusing a deepcopy leaves the original working.

    Raises:
        ValueError: the model was never applied, is fused already, or a weight is not finite (named; nothing is
            changed).
    """
    layers = applied_layers(model)
    for name, (module, tensor_name, epc) in layers.items():
        if is_sharded(epc.parameter):
            raise ValueError(
                f"{name}: its latent is sharded; gather the whole state_dict and load it into an applied model that is "
                "not, or make it plain with hbnn_plugin.plain_state_dict"
            )
        bad = int((~getattr(module, tensor_name).isfinite()).sum())
        if bad:
            raise ValueError(f"{name}: its weight holds {bad} non-finite value(s); nothing was fused")
        if sum(other is epc for _, _, other in layers.values()) < epc.tied_layers:
            raise ValueError(f"{name}: its weight is tied to a layer outside of this model; fuse the whole model")
    places: dict[EPC, list[tuple[nn.Module, str]]] = {}
    for module, tensor_name, epc in layers.values():
        places.setdefault(epc, []).append((module, tensor_name))
    for epc, tied in places.items():
        epc.detach_from(tied)
    remove_hooks(model)
    for module in model.modules():  # apply may have been called on a part
        remove_batching(module)
    fuse_binarized(model)
    return model
