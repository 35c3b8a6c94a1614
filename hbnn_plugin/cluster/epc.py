"""One layer's exponential parametrization cluster: its points, what they make of a latent, and what travels with them.

How the weight and its latent sit in the host is the business of the two modes, ``cluster/parametrization.py`` and
``cluster/inplace.py``.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..geometry.ball import MARGIN
from ..geometry.dtypes import scalar_dtype, working_dtype
from ..geometry.exponential import exp_map, exp_map_mapped, log_map, mobius_scale
from ..geometry.joint_maps import Map, Mapped
from ..geometry.passes import combine, inner
from ..geometry.scalars import Radius
from ..host.selection import own_class
from ..host.sharding import whole
from .settings import Settings

__all__ = ["EPC", "INPLACE_SUFFIX", "alive", "applied_layers", "find", "own_radius"]

_ALIVE: weakref.WeakSet[EPC] = weakref.WeakSet()
_ALIVE_LOCK = threading.RLock()

INPLACE_SUFFIX = "_epc"
"""In in-place mode the cluster of ``conv.weight`` is the child ``conv.weight_epc``."""


def alive() -> list[EPC]:
    """Every registered cluster of this process, deep copies included."""
    with _ALIVE_LOCK:
        return [epc for epc in _ALIVE if epc.registered]


def find(module: nn.Module) -> dict[str, EPC]:
    """The clusters on a module's own tensors, by tensor name, in whichever mode."""
    found: dict[str, EPC] = {}
    lists = module._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict):
        # a list is [EPC] as apply leaves it; somebody else may have appended to it since
        found = {name: epc for name, entries in lists.items() for epc in entries.children() if isinstance(epc, EPC)}
    for name, child in module._modules.items():
        if isinstance(child, EPC) and name.endswith(INPLACE_SUFFIX):
            found[name.removesuffix(INPLACE_SUFFIX)] = child
    return found


def applied_layers(model: nn.Module) -> dict[str, tuple[nn.Module, str, EPC]]:
    """Layer name → (module, tensor name, cluster) of an applied model. Raises ValueError if there is none."""
    found: dict[str, tuple[nn.Module, str, EPC]] = {}
    for name, module in model.named_modules():
        clusters = find(module)
        for tensor_name, epc in clusters.items():
            label = name or own_class(module).__name__
            found[label if len(clusters) == 1 else f"{label}.{tensor_name}"] = (module, tensor_name, epc)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no exponential parametrization: call hbnn_plugin.apply(model) first"
        )
    return found


def own_radius(radius: float, scale: Tensor | None) -> Radius:
    """r in a weight's own units: x = s·EPC(v/s) is EPC in the ball of radius r/s²."""
    return radius if scale is None else radius / scale.to(scalar_dtype(scale.device)) ** 2


class EPC(nn.Module, ABC):
    r"""weight = exp_p(v) for a latent v and one point p a filter or a layer ([HBNN] Eq. 6).

    The point is a buffer, not a parameter: no optimizer can decay it, average it or count it in a norm, and nobody has
    to put it into a parameter group. Its gradient is recovered from the latent's (``optimizer/recovery.py``).

    Args:
        weight: the tensor to be parametrized; gives shape, dtype, device, and the point's start.
        settings: what the user chose.
        shape: the weight's logical shape, where the module stores it flat; output units come first.
        unit_dims: the dimensions of ``shape`` that count output units (filters).
        name: what messages call this weight.

    Buffers:
        point: p, of the weight's logical shape; float32 or better.
        scale: s of x = s·EPC(v/s), one a point, with ``relative=True``.
        momentum: of the point, with ``point_momentum`` or Riemannian Adam; of p's shape.
        mean_square: running mean square of the point's gradient, one a point, for Adam-like steps.
        squares_weight: the sum of the weights in that mean, one a point: 0 before the first such step, in the end 1.
        steps: how many steps the point has made.

    The binary weight that flips are counted from (``flip_reference``, one bit a weight, on the CPU) and the settings
    travel in the state_dict's ``_extra_state``.
    """

    cast_buffers: ClassVar[frozenset[str]] = frozenset()
    """Those that take half precision with the model."""

    point: Tensor
    scale: Tensor | None
    momentum: Tensor | None
    mean_square: Tensor
    squares_weight: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Tensor,
        settings: Settings,
        *,
        shape: tuple[int, ...] | None = None,
        unit_dims: tuple[int, ...] = (0,),
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.shape = tuple(shape or weight.shape)
        self.unit_dims = unit_dims
        self.flat = self.shape != tuple(weight.shape)
        self.dims = settings.point_dims(self.shape, unit_dims)
        self.tied_layers = 1  # more for tied weights
        self.revision = 0  # goes up with each of the point's moves, for telling whether it has made one since
        self.hooked = False  # whether some optimizer's step has taken this cluster along
        self.reference_is_stale = False
        self.loaded_weight: Tensor | None = None  # with its latent, from a checkpoint of in-place mode
        w = self.logical(weight.detach()).to(working_dtype(weight.dtype))
        per_point = inner(w, w, self.dims)
        self.register_buffer("point", torch.zeros_like(w))
        self.register_buffer("scale", None)
        if settings.relative:
            self.scale = torch.where(per_point > 0, per_point.sqrt(), 1.0).to(w.dtype)
        with_momentum = settings.point_momentum > 0 or settings.rule == "riemannian-adam"
        self.register_buffer("momentum", torch.zeros_like(w) if with_momentum else None)
        self.register_buffer("mean_square", torch.zeros_like(per_point, dtype=w.dtype))
        self.register_buffer("squares_weight", torch.zeros_like(self.mean_square))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=w.device))
        # Not a buffer: bits are not to be averaged (EMA), cast or broadcast (DDP). It travels in the extra state.
        self.flip_reference = torch.zeros((w.numel() + 7) // 8, dtype=torch.uint8, device="cpu")
        self._start(weight)
        self._live()

    # -- what a mode supplies ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def registered(self) -> bool:
        """Whether this cluster sits in a host."""

    @property
    @abstractmethod
    def parameter(self) -> nn.Parameter:
        """The Parameter that the optimizer knows; while it steps, it holds the latent v."""

    @abstractmethod
    def bypassed(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the host's weight is the latent itself."""

    @abstractmethod
    def attach(self, module: nn.Module, tensor_name: str) -> None:
        """Sit on the module's weight; called again for each layer whose weight is tied to it."""

    @abstractmethod
    def detach_from(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        """Leave all of the layers that it sits on with a plain weight, exp_p(v) as it is now."""

    # -- the map -----------------------------------------------------------------------------------------------------

    @property
    def radius(self) -> Radius:
        """r in the weight's own units."""
        return own_radius(self.settings.radius, self.scale)

    def map_of(self, latent: Tensor) -> Map:
        """The map that makes a weight of the latent, in the logical shape; float32 or better."""
        v = self.logical(whole(latent)).to(self.point.dtype)
        return Map(self.point, v, self.radius, self.settings.geometry, self.dims)

    def weight_of(self, latent: Tensor, mapped: Mapped | None = None) -> Tensor:
        """The weight exp_p(v): shape and dtype of the latent. ``mapped``: of this latent, if it is worked out."""
        if mapped is None:
            x = exp_map(self.point, self.logical(whole(latent)), self.radius, self.settings.geometry, self.dims)
        else:
            x = exp_map_mapped(self.map_of(latent), mapped).to(latent.dtype)
        return x.reshape(latent.shape) if self.flat else x  # even of the same shape it would be one more autograd node

    @torch.no_grad()
    def latent_of(self, weight: Tensor) -> tuple[Tensor, int]:
        """The latent of a weight and for how many points the weight's length could not be kept."""
        if weight.numel() != math.prod(self.shape):
            raise ValueError(f"{self.name}: expected a weight of shape {self.shape}, got {tuple(weight.shape)}")
        w = self.logical(weight).to(self.point.dtype)
        if not bool(w.isfinite().all()):
            raise ValueError(f"{self.name}: the weight holds {int((~w.isfinite()).sum())} non-finite value(s)")
        latent, moved = self.inverse(w)
        return latent.reshape(weight.shape).to(weight.dtype), int(moved.sum())

    def inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The latent of a finite weight in its logical shape, and where its length could not be kept, a bool a point.

        In the ball it looks at no value, which on a GPU would mean waiting for it.
        """
        target, moved = self._into_space(w)
        if self.settings.space == "sphere":
            zeros = int((w.abs().amax(self.dims) == 0).sum())
            if zeros:
                raise ValueError(
                    f"{self.name}: the weight is zero at {zeros} point(s), which has no place on the sphere"
                )
            target = self._off_the_antipode(target)
        return log_map(self.point, target, self.radius, self.settings.geometry, self.dims), moved

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        """Put the point at its start for this weight.

        In the ball p = start ⊗ W: 0 is the origin, 1 the weight itself (v = 0). On the sphere it is the weight.
        """
        w, _ = self._into_space(self.logical(weight.detach()).to(self.point.dtype))
        start = self.settings.start
        if self.settings.space == "sphere" or start == 1:
            self.point.copy_(w)
        elif start > 0:
            self.point.copy_(mobius_scale(start, w, self.radius, self.dims))

    def _into_space(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w with its length changed where it has to be, and a flag a point that says where."""
        size = w.abs().amax(self.dims, keepdim=True).clamp(min=1e-30)
        unit = w / size  # ‖w‖² itself may overflow
        reach = (self.radius * inner(unit, unit, self.dims)).sqrt() * size
        if self.settings.space == "sphere":
            moved = (reach - 1).abs() > 1e-5
            return combine((size / reach.clamp(min=1e-30),), (unit,)), moved
        moved = reach > 1 - MARGIN
        return torch.where(moved, combine(((1 - MARGIN) * size / reach.clamp(min=1e-30),), (unit,)), w), moved

    def _off_the_antipode(self, target: Tensor) -> Tensor:
        """Opposite to the point every direction leads to the target: tilt it by 1e-4 to have one."""
        total = target + self.point
        opposite = self.radius * inner(total, total, self.dims) < 1e-8
        generator = torch.Generator().manual_seed(0)
        tilt = torch.randn(target.shape, generator=generator, dtype=target.dtype, device="cpu").to(target.device)
        scale = 1e-4 * (inner(target, target, self.dims) / inner(tilt, tilt, self.dims)).sqrt()
        return torch.where(opposite, self._into_space(target + scale.to(target.dtype) * tilt)[0], target)

    def warn_of_lengths(self, outside: int, stacklevel: int = 2) -> None:
        """Say that for so many points a weight's length could not be kept."""
        edge = "on the sphere" if self.settings.space == "sphere" else "inside the ball"
        warnings.warn(
            f"{self.name}: the assigned weight does not lie {edge} for {outside} of {self.point_count} point(s) "
            f"(radius {self.settings.radius:g}); its direction is kept and its length is not. "
            "A smaller radius, or apply(..., relative=True), would keep both.",
            stacklevel=stacklevel + 1,
        )

    def logical(self, tensor: Tensor) -> Tensor:
        """The tensor in the logical shape of the weight."""
        return tensor.reshape(self.shape) if self.flat else tensor

    # -- what others ask ---------------------------------------------------------------------------------------------

    @property
    def scalar_shape(self) -> torch.Size:
        """Of what is one number a point: size 1 in ``dims``."""
        return self.mean_square.shape

    @property
    def point_count(self) -> int:
        """How many points the layer has."""
        return self.mean_square.numel()

    @torch.no_grad()
    def reach(self) -> Tensor:
        """√r‖p‖ of every point: 0 at the origin, 1 at the ball's edge. (On the sphere it is 1.)"""
        return (self.radius * inner(self.point, self.point, self.dims)).sqrt().flatten()

    def extra_repr(self) -> str:
        return f"{self.settings}, points={self.point_count}"

    def get_extra_state(self) -> Tensor:
        """Settings and layout as JSON, a zero byte, the flip reference.

        In one uint8 tensor, so that weights_only loading and safetensors can hold it.
        """
        header = json.dumps({**asdict(self.settings), "shape": self.shape, "dims": self.dims}).encode() + b"\0"
        return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), self.flip_reference])

    def set_extra_state(self, state: Tensor) -> None:
        """Take the flip reference; the rest is checked for the whole model first (``retrofit/loading.py``)."""
        self.flip_reference = state.cpu()[-len(self.flip_reference) :].clone()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._live()

    def _live(self) -> None:
        with _ALIVE_LOCK:
            _ALIVE.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EPC:
        """Move with the model, but stay in float32 or better when it is cast to half precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in before.keys() - self.cast_buffers:
            old, now = before[name], self._buffers[name]
            if old is not None and now is not None and now.is_floating_point():
                dtype = working_dtype(now.dtype)
                if dtype != now.dtype:
                    self._buffers[name] = old.to(device=now.device, dtype=dtype)
        return self
