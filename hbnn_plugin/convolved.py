"""What a layer's forward really convolves with: the host's binary weight, captured rather than assumed.

Hosts derive their binary weight from ``self.weight`` in their own way (IR-Net: sign(w − mean); SiMaN: a split by
magnitude). The layer is run once on a small input and the weight argument of its convolution is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .sharding import is_sharded, whole

__all__ = ["binary_value", "convolved_weight", "is_two_valued", "pack_bits", "unpack_bits"]

_CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.linear,
        torch.convolution,
    }
)


class _Recorder(TorchFunctionMode):
    """Keeps the weight of every convolution and linear map that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.weights.append(weight.detach())
        return func(*args, **kwargs)


def _small_input(module: nn.Module, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The smallest input the layer takes, with both signs in it."""
    kernel = shape[2:]
    if len(shape) == 2 or isinstance(module, nn.Linear):
        size: tuple[int, ...] = (2, shape[-1])
    else:
        groups = int(getattr(module, "groups", 1))
        channels = int(getattr(module, "in_channels", shape[1] * groups))
        dilation = getattr(module, "dilation", 1)
        steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(kernel)
        size = (2, channels, *(d * (k - 1) + 1 for k, d in zip(kernel, steps)))
    return torch.linspace(-1, 1, math.prod(size), dtype=like.dtype, device=like.device).reshape(size)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its children, without what parametrize keeps in it."""
    lists = getattr(module, "parametrizations", None)
    bookkeeping = set(lists.modules()) if isinstance(lists, nn.ModuleDict) else set()
    return (m for m in module.modules() if m not in bookkeeping)


@torch.no_grad()
def convolved_weight(
    module: nn.Module, shape: tuple[int, ...], weight: Tensor, evaluating: bool = False
) -> Tensor | None:
    """The tensor that ``module.forward`` convolves with, or None where the layer does not run on a small input.

    Args:
        module: the layer; its buffers, weight, mode and the random state are left as they were.
        shape: the logical shape of its weight.
        weight: its weight, for dtype, device and size.
        evaluating: look in evaluation mode; else in the mode that the layer is in.
    """
    before = weight.detach().clone()  # hosts there are that write into their weight's .data
    # The layer gets copies of its buffers: the originals may be saved in a graph that waits for its backward.
    kept = [(m, n, b) for m in _own_modules(module) for n, b in m._buffers.items() if b is not None]
    sharded = [(m, n, p) for m in _own_modules(module) for n, p in m._parameters.items() if p is not None]
    sharded = [(m, n, p) for m, n, p in sharded if is_sharded(p)]
    modes = [(m, m.training) for m in module.modules()]
    recorder = _Recorder()
    try:
        if evaluating:
            for m, _ in modes:
                m.training = False
        for owner, name, buffer in kept:
            owner._buffers[name] = buffer.clone()
        for owner, name, parameter in sharded:
            owner._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), recorder:
            module.forward(_small_input(module, shape, weight))
    except Exception:  # a host may want other inputs; the caller falls back to the sign of the weight
        return None
    finally:
        for owner, name, buffer in kept:
            owner._buffers[name] = buffer
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter
        for m, mode in modes:
            m.training = mode
        if weight.is_leaf and not torch.equal(weight, before):
            weight.data.copy_(before)
    found = [w for w in recorder.weights if w.numel() == weight.numel()]
    return found[0].clone() if found else None


def is_two_valued(weight: Tensor, unit_dims: tuple[int, ...] = (0,), tolerance: float = 1e-3) -> bool:
    """Whether each filter of a convolved weight holds at most two values, up to ``tolerance`` of their distance.

    A filter is what ``unit_dims`` count.

    The tolerance is for hosts that write sign(w).detach() − w.detach() + w, which leaves rounding.
    """
    units = weight.movedim(unit_dims, tuple(range(len(unit_dims))))
    rows = units.reshape(math.prod(units.shape[: len(unit_dims)]), -1).float()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    from_nearest = torch.minimum(rows - low, high - rows)
    scale = torch.maximum(high - low, rows.abs().amax(1, keepdim=True))
    return bool((from_nearest <= tolerance * scale).all())


def binary_value(weight: Tensor) -> Tensor:
    """One bool a weight: the upper of the two values (+1 of ±1, 1 of {0, 1})."""
    return weight > 0


def pack_bits(bits: Tensor) -> Tensor:
    """Eight bools a byte, the first in the least significant bit; uint8 of ⌈n/8⌉."""
    flat = F.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[:numel].bool()
