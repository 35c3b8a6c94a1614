"""In-place mode: the host keeps its own weight, class, keys and graph, and only an optimizer's step sees the latent.

Outside of a step the host's weight holds x = exp_p(v), and the host may do to it what it likes. During a step it holds
v and the gradient of v, for the user's optimizer to act on (``cluster/swapping.py``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..geometry.dtypes import working_dtype
from ..geometry.joint_maps import Map
from ..geometry.looking import recorded, traced
from ..host.sharding import is_sharded, sharded_like, whole
from .epc import EPC, INPLACE_SUFFIX
from .watching import StepWatch

__all__ = ["InPlace", "edited"]

_SAME = 8.0
"""A weight within so many roundings of the mapped one's largest is the mapped one: computed elsewhere it rounds
otherwise."""


def edited(weight: Tensor, mapped: Tensor, dims: tuple[int, ...]) -> Tensor:
    """One bool a point: whether its weights are not the mapped ones. A NaN is an edit too."""
    size = mapped.abs().amax(dims, keepdim=True)
    # Maps are worked out in float32 or better; a coarser dtype rounds the result once.
    stored, worked_out = (torch.finfo(dtype).eps for dtype in (weight.dtype, working_dtype(weight.dtype)))
    same = (weight - mapped).abs() <= stored * mapped.abs() + _SAME * worked_out * size
    return ~same.all(dims, keepdim=True)


class InPlace(EPC):
    """The cluster of a weight that stays the host's own Parameter.

    Buffers, besides those of :class:`EPC`:
        latent: v, of the weight's shape and dtype. (While an optimizer steps, the weight itself holds it.)
    """

    cast_buffers = frozenset({"latent"})  # as the weight is

    latent: Tensor
    host: tuple[nn.Module, str] | None = None  # in a tuple, so that it is not taken for a submodule

    def __init__(self, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        self.register_buffer("latent", self.latent_of(weight.detach())[0])
        self.upstream: Tensor | None = None
        self.written: Tensor | None = None
        self.swapped = False  # whether the host's weight holds the latent
        self.unmapped = False  # whether it has yet to be written, from the latent
        self.may_warn = self.settings.space == "ball"
        self._lost = False
        self._watch = StepWatch()
        self._watching: list[RemovableHandle] = []

    @property
    def registered(self) -> bool:
        """Whether this cluster sits in a host that still has the weight."""
        if self.host is None:
            return False
        module, tensor_name = self.host
        there = module._parameters.get(tensor_name) is not None
        if not there and not self._lost:
            self._lost = True
            warnings.warn(
                f"{self.name}: the layer has no Parameter {tensor_name!r} any more (pruned or parametrized after "
                "apply?) and trains without its point from here on. Call hbnn_plugin.fuse before such a change.",
                stacklevel=2,
            )
        return there

    @property
    def parameter(self) -> nn.Parameter:
        """The host's weight."""
        if self.host is None:
            raise RuntimeError(f"{self.name}: this cluster is not registered on a module")
        module, tensor_name = self.host
        weight = module._parameters.get(tensor_name)
        if weight is None:
            raise RuntimeError(
                f"{self.name}: the layer has no Parameter {tensor_name!r} any more (pruned or parametrized after "
                "apply?); undo that, and call hbnn_plugin.fuse before such a change"
            )
        return weight

    def check_shape(self) -> None:
        """Raise RuntimeError if somebody has given the host a weight of another shape."""
        if self.parameter.shape != self.latent.shape:
            raise RuntimeError(
                f"{self.name}: its weight has been replaced by one of the shape {tuple(self.parameter.shape)}, where "
                f"apply saw {tuple(self.latent.shape)}; undo that, and call hbnn_plugin.fuse before such a change"
            )

    @torch.no_grad()
    def attach(self, module: nn.Module, tensor_name: str) -> None:
        """Sit beside the module's weight; beside that of each layer that is tied to the first, too."""
        module.add_module(tensor_name + INPLACE_SUFFIX, self.train(module.training))
        if self.host is None:
            self.host = (module, tensor_name)
            self.parameter.copy_(self.weight_of(self.latent))
            self._watching = [
                module.register_forward_pre_hook(self._watch_steps),
                module.register_forward_hook(self._watch_forward),
            ]

    def detach_from(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        """Leave the layers with their weight as it is."""
        self.host = None  # no optimizer step is to find this cluster any more
        self._end_watch()
        for module, tensor_name in layers:
            del module._modules[tensor_name + INPLACE_SUFFIX]

    def memory(self, of: Map) -> Tensor:
        """Where the mapped weight can be worked out: in the host's weight itself, if it is whole and of the dtype."""
        weight = self.parameter.detach()
        if is_sharded(weight) or weight.dtype != of.latent.dtype:
            return torch.empty_like(of.latent)
        return self.logical(weight)

    def fingerprint(self) -> Tensor:
        """Sums and norms of the weight's rows, (2, ...), float32 or better: hardly any edit leaves them as they are."""
        weight = self.logical(whole(self.parameter.detach())).to(self.point.dtype)
        rows = tuple(d for d in self.dims if d) or self.dims
        return torch.stack([weight.sum(rows), torch.linalg.vector_norm(weight, dim=rows)])

    def edits(self) -> Tensor:
        """One bool a point: whether the host has changed its weight, by value: ``.data`` edits bump no version."""
        weight = self.logical(whole(self.parameter.detach()))
        return edited(weight, self.logical(self.weight_of(self.latent)), self.dims)

    def honour(self, changed: Tensor) -> Tensor:
        """Take the weight into the latent, through the inverse map, at these points.

        Returns:
            One bool a point: where the weight's length could not be kept.
        """
        weight = self.logical(whole(self.parameter.detach()))
        finite = weight.isfinite().all(self.dims, keepdim=True) if self.dims else weight.isfinite()
        inverse, outside = self.inverse(torch.where(changed & finite, weight.to(self.point.dtype), self.point))
        latent = torch.where(finite, inverse.to(weight.dtype), weight)  # what is not is to be seen, as in the bare host
        self.latent.copy_(torch.where(changed, latent, self.logical(self.latent)).reshape(self.latent.shape))
        return outside

    def _watch_steps(self, module: nn.Module, args: object) -> None:
        if traced() or recorded() or not self.registered:
            return
        changes = self._watch.changes_without_step(self, self.parameter)
        if self._watch.is_over:
            self._end_watch()
        if changes:
            warnings.warn(
                f"{self.name}: its weight has changed {changes} times, and no optimizer step has been seen. An "
                "optimizer that does not fire torch's step hooks (it may skip super().__init__()) trains the bare host "
                "in in-place mode: let it call super().__init__(), or use hbnn_plugin.ClusterSGD, ClusterAdam or "
                "ClusterAdamW.",
                stacklevel=2,
            )

    def _watch_forward(self, module: nn.Module, *_: object) -> None:
        if not (traced() or recorded()) and self.registered:
            self._watch.after_forward(self.parameter)

    def _end_watch(self) -> None:
        while self._watching:
            self._watching.pop().remove()

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the host's weight is the latent itself."""
        weight = self.parameter.data  # unseen by autograd: a backward may be due, and the values come back
        before = weight.clone()
        weight.copy_(sharded_like(self.latent, weight))
        try:
            yield
        finally:
            weight.copy_(before)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InPlace:
        super()._apply(fn, recurse)
        self.written = None
        return self

    @staticmethod
    def when_loaded() -> None:
        """What a whole model needs that is loaded where apply was never called: the optimizers' hooks.

        ``optimizer/hooking.py``, which this package may not import, puts its ``install`` here.
        """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.when_loaded()
