"""What each binary layer convolves with in evaluation: one bit a weight, one scale a filter; captured, not assumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ..cluster.epc import find
from ..cluster.settings import Settings
from ..host.bits import by_unit
from ..host.convolved import convolved_weight
from ..host.selection import Predicate, Selected, binary_convolutions, select
from ..retrofit.fusing import fuse

__all__ = [
    "BinaryWeight",
    "binary_weights",
    "cluster_settings",
    "plain_copy",
    "scales_of",
    "seen_weights",
    "signed",
    "unwrapped",
]

ROUNDINGS = 32
"""How many roundings of its dtype a weight may lie from ±scale: hosts write sign(w).detach() − w.detach() + w."""

_ROUNDINGS_16 = 4
"""The same in 16 bits, where 32 would be 3 or 25 percent."""


class BinaryWeight(NamedTuple):
    """What one layer convolves with: +scale where ``bits`` is True, −scale elsewhere."""

    layer: Selected
    """Where it is: qualified name, module, tensor name, logical shape, the dimensions that count output units."""
    bits: Tensor
    """bool, of the logical shape, on the CPU."""
    scale: Tensor
    """One number ≥ 0 a filter (an output unit), of the dtype that is convolved with, on the CPU."""

    @property
    def value(self) -> Tensor:
        """±scale, of the logical shape."""
        return signed(self.bits, self.scale, self.layer.unit_dims)


def signed(bits: Tensor, scale: Tensor, unit_dims: tuple[int, ...]) -> Tensor:
    """+scale where ``bits`` is True, −scale elsewhere; one scale for all, or one for each unit that the dims count."""
    if scale.numel() > 1:
        scale = scale.reshape([n if d in unit_dims else 1 for d, n in enumerate(bits.shape)])
    return torch.where(bits, scale, -scale)


def binary_weights(
    model: nn.Module, where: Predicate | None = None, also: Container[str] = ()
) -> dict[str, BinaryWeight]:
    """Layer name → what it convolves with in evaluation mode, of every binary layer. The model stays as it is.

    Args:
        model: applied, in either mode, fused, or never applied.
        where: predicate ``(module, qualified_name) -> bool`` that names the binary layers. By default these are the
            layers with a cluster, those of :func:`hbnn_plugin.binary_convolutions`, and every other convolution or
            linear layer whose weight is +s and −s exactly, as in a fused model: with one s a filter, at least two
            weights in a filter, and both signs in the layer.
        also: names of other layers that by default have to be binary.

    Raises:
        ValueError: a layer that ``where`` takes, or that by default has to be binary, is not: what it convolves with
            lies further than :data:`ROUNDINGS` roundings from ±scale, one scale a filter. Every such layer is named.
    """
    found: dict[str, BinaryWeight] = {}
    wrong: list[str] = []
    for layer, seen in seen_weights(model, where, also):
        if isinstance(seen, BinaryWeight):
            found[layer] = seen
        else:
            wrong.append(f"{layer or type(model).__name__}: {seen}")
    if wrong:
        raise ValueError(
            "not binary in evaluation mode:\n  "
            + "\n  ".join(wrong)
            + "\nwhere=... names the layers that are, such as hbnn_plugin.by_name(...)"
        )
    return found


def seen_weights(
    model: nn.Module, where: Predicate | None = None, also: Container[str] = ()
) -> Iterator[tuple[str, BinaryWeight | str]]:
    """As :func:`binary_weights`, with a sentence in the place of each binary weight that should be one and is not."""
    for name, module, layer in select(model, where or (lambda _module, _name: True)):
        expected = where is not None or name in also or bool(find(module)) or binary_convolutions(module, name)
        if layer is None:
            seen: BinaryWeight | str = "no weight of its own can be told"
        else:
            seen = _look(layer, ROUNDINGS if expected else 0)
        if expected or (isinstance(seen, BinaryWeight) and _beyond_doubt(seen)):
            yield name, seen


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside parallel wrappers and ``torch.compile``. Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without clusters and parallel wrappers, in evaluation mode. Raises as :func:`hbnn_plugin.fuse`."""
    inner = unwrapped(model)
    # A host may have kept the weight that its last forward computed; torch copies no tensor with a history.
    kept = tree_leaves([vars(module) for module in inner.modules()])
    known = {id(value): value.detach().clone() for value in kept if isinstance(value, Tensor) and value.grad_fn}
    copied = copy.deepcopy(inner, known)
    if cluster_settings(copied):
        fuse(copied)
    return copied.eval()


def cluster_settings(model: nn.Module) -> dict[str, Settings]:
    """Layer name → what its cluster was made with, of every layer that has one."""
    modules = unwrapped(model).named_modules()
    return {name: epc.settings for name, module in modules for epc in find(module).values()}


@torch.no_grad()
def _look(layer: Selected, roundings: int) -> BinaryWeight | str:
    if math.prod(layer.shape) == 0 or not layer.shape or layer.weight.is_meta:
        return "its weight is empty, or not initialized"
    convolved = convolved_weight(layer.module, layer.shape, layer.weight, evaluating=True)
    if convolved is None:
        return "on a small input its forward runs no convolution or linear map with a weight of this size"
    weight = convolved.cpu().reshape(layer.shape)
    bad = int((~weight.isfinite()).sum())
    if bad:
        return f"what it convolves with holds {bad} non-finite value(s)"
    scale, far = scales_of(weight, layer.unit_dims, roundings)
    if bool(far.any()):
        unit = int(far.nonzero()[0])
        row = by_unit(weight.abs(), layer.unit_dims)[unit]
        low, high = float(row.min()), float(row.max())
        return f"{int(far.sum())} of {len(far)} filters are not ±scale: in filter {unit} |w| is {low:.6g} to {high:.6g}"
    return BinaryWeight(layer, ~weight.signbit(), scale)


def scales_of(weight: Tensor, unit_dims: tuple[int, ...], roundings: int = ROUNDINGS) -> tuple[Tensor, Tensor]:
    """The scale of each filter of a convolved weight, and whether the filter is further than that from ±scale."""
    rows = by_unit(weight.abs(), unit_dims)
    scales = rows.median(1).values
    apart = (rows - scales[:, None]).abs().amax(1)
    if weight.element_size() == 2:
        roundings = min(roundings, _ROUNDINGS_16)
    return scales, apart > roundings * torch.finfo(weight.dtype).eps * scales


def _beyond_doubt(seen: BinaryWeight) -> bool:
    """Whether an exact ±scale is no real-valued weight by chance: not one weight a filter, nor a constant."""
    several = seen.bits.numel() >= 2 * seen.scale.numel()
    return several and bool(seen.scale.any()) and 0 < int(seen.bits.sum()) < seen.bits.numel()
