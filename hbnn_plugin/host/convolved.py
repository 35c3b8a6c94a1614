"""What a layer's forward really convolves with: the host's binary weight, captured rather than assumed.

Hosts derive their binary weight from ``self.weight`` in their own way (IR-Net: sign(w − mean); SiMaN: a split by
magnitude). The layer is run once on a small input and the weight argument of its convolution is kept.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .sharding import is_sharded, whole

__all__ = [
    "CONVOLUTIONS",
    "convolved_weight",
    "edits_its_weight",
    "small_input",
]

CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
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

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_MODULE_STATE = frozenset(vars(nn.Module()))


class _Recorder(TorchFunctionMode):
    """Keeps the weight of every convolution and linear map that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.assigned: list[Tensor] = []
        """Tensors whose ``.data`` was assigned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if isinstance(weight, Tensor):  # not a library's pair of values and scale
                self.weights.append(weight.detach().clone())  # its host may put other values there
        elif func is _SET_DATA:
            self.assigned.append(args[0])
        return func(*args, **kwargs)


def small_input(module: nn.Module, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The smallest input the layer takes, with both signs in it."""
    kernel = module.kernel_size if isinstance(module, _ConvNd) else shape[2:]
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

    Of several, the last: some calibrate with the real weight first.

    Args:
        module: the layer; its buffers, weight, mode and torch's random state are left as they were.
        shape: the logical shape of its weight.
        weight: its weight, for dtype, device and size.
        evaluating: look in evaluation mode; else in the mode that the layer is in.
    """
    recorder = _Recorder()
    with _undisturbed(module, weight):
        if evaluating:
            for m in module.modules():
                m.training = False
        if not _runs(module, shape, weight, recorder):
            return None
    found = [w for w in recorder.weights if w.numel() == weight.numel()]
    return found[-1] if found else None


@torch.no_grad()
def edits_its_weight(module: nn.Module, shape: tuple[int, ...], weight: Tensor) -> bool | None:
    """Whether ``module.forward`` writes into its weight, or puts an attribute on it; everything is left as it was.

    None if nothing was seen and it could not be run to the end.
    """
    if not isinstance(weight, nn.Parameter):
        return False
    recorder = _Recorder()
    with _undisturbed(module, weight):
        # Neither centred nor within any bounds, so that centring and clipping show.
        generator = torch.Generator().manual_seed(0)
        strange = (50 + 100 * torch.randn(weight.shape, generator=generator, device="cpu")).to(weight)
        weight.data = strange
        before, attributes = strange.clone(), set(vars(weight))
        for m in module.modules():
            m.training = True
        ran = _runs(module, shape, weight, recorder)
        moved = weight.data_ptr() != strange.data_ptr() or not torch.equal(weight, before)
        edits = moved or any(tensor is weight for tensor in recorder.assigned) or set(vars(weight)) != attributes
        return edits or (False if ran else None)


def _runs(module: nn.Module, shape: tuple[int, ...], weight: Tensor, recorder: _Recorder) -> bool:
    try:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), recorder:
            module.forward(small_input(module, shape, weight))
    except Exception:  # a host may want other inputs
        return False
    return True


@contextlib.contextmanager
def _undisturbed(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Afterwards the module is as it was, whatever a forward inside has done to it.

    Inside it has copies of its buffers, of its parameters other than the weight, and of the tensors and containers that
    are plain attributes of it: the originals may be saved in a graph that waits for its backward.
    """
    storage, before = weight.data, weight.detach().clone()  # hosts there are that write into their weight's .data
    attributes = dict(vars(weight))
    kept = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in _own_modules(module)]
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, plain, parameters, buffers in kept:
            m._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
            for name, p in parameters.items():
                if p is not None and (p is not weight or is_sharded(p)) and not is_lazy(p):
                    m._parameters[name] = _copy_of(p)
            vars(m).update({name: _copy(value) for name, value in plain.items() if name not in _MODULE_STATE})
        yield
    finally:
        for m, plain, parameters, buffers in kept:
            _reset(vars(m), plain)
            _reset(m._parameters, parameters)
            _reset(m._buffers, buffers)
        for m, mode in modes:
            m.training = mode
        if weight.is_leaf:
            if weight.data_ptr() != storage.data_ptr():
                weight.data = storage
            if not torch.equal(weight, before):
                weight.data.copy_(before)
            for name in set(vars(weight)) - set(attributes):
                delattr(weight, name)


def _copy_of(parameter: nn.Parameter) -> nn.Parameter:
    """With its attributes, and the methods of its class, which a forward may call."""
    cls = type(parameter) if issubclass(type(parameter), nn.Parameter) else nn.Parameter
    data = whole(parameter.detach()).clone()
    copied: nn.Parameter = Tensor._make_subclass(cls, data, parameter.requires_grad)
    vars(copied).update(vars(parameter))
    return copied


def _reset(now: MutableMapping[str, Any], then: Mapping[str, Any]) -> None:
    for name in set(now) - set(then):
        del now[name]
    now.update(then)


def _copy(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value
