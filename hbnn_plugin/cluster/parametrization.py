"""Parametrize mode: the cluster as a torch parametrization, latent v in, weight exp_p(v) out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ..geometry.joint_maps import Mapped
from ..geometry.looking import checksum, recorded, traced
from ..host.sharding import whole
from .epc import EPC, find
from .watching import StepWatch

__all__ = ["Parametrized"]

_WATCHED_READS = 20


class Parametrized(EPC):
    """The cluster registered with torch.nn.utils.parametrize: the latent is ``original``, the weight is computed."""

    owner: tuple[ParametrizationList] | None = None  # in a tuple, so that it is not taken for a submodule

    def __init__(self, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        self._bypass = False
        self.precomputed: tuple[Tensor, int, Mapped] | None = None  # of a latent, at a version
        self._watch = StepWatch()
        self._reads_to_watch = _WATCHED_READS
        self._last_read: tuple[Tensor, float] | None = None

    @property
    def registered(self) -> bool:
        """Whether this cluster sits in a host."""
        return self.owner is not None

    @property
    def parameter(self) -> nn.Parameter:
        """The latent v as the optimizer knows it."""
        if self.owner is None:
            raise RuntimeError(f"{self.name}: this cluster is not registered on a module")
        latent: nn.Parameter = self.owner[0].original  # type: ignore[assignment]
        return latent

    def attach(self, module: nn.Module, tensor_name: str) -> None:
        """Register on the module's weight; once more for each layer that is tied to the first."""
        names = list(module._parameters)
        followers = names[names.index(tensor_name) + 1 :]
        if self.owner is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # weights outside the ball are reported for all layers together
                parametrize.register_parametrization(module, tensor_name, self)
            self.owner = (_lists(module)[tensor_name],)  # type: ignore[assignment]
        else:  # registering this again would take the inverse of the latent: an identity has none, and keeps the place
            parametrize.register_parametrization(module, tensor_name, nn.Identity())
            _lists(module)[tensor_name] = self.owner[0]
        vars(_lists(module)).setdefault("followers", {})[tensor_name] = followers
        _guard_registration(type(module))

    @torch.no_grad()
    def detach_from(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        """Leave the layers with a plain weight, in the very Parameter that held the latent."""
        module, tensor_name = layers[0]
        weight, parameter = getattr(module, tensor_name).clone(), self.parameter
        self.owner = None  # no optimizer step is to find this cluster any more
        parameter.data, parameter.grad = weight, None  # the gradient was the latent's
        for module, tensor_name in layers:
            followers = vars(_lists(module))["followers"][tensor_name]
            _remove_parametrization(module, tensor_name)
            _restore_parameter(module, tensor_name, parameter, followers)

    def forward(self, latent: Tensor) -> Tensor:
        """The weight exp_p(v): shape and dtype of the latent."""
        if self._bypass:
            return whole(latent)
        if traced():  # which fuses by itself, and would guard on every counter that it meets
            return self.weight_of(latent)
        precomputed = self.precomputed
        if precomputed is not None and precomputed[0] is latent and precomputed[1] == _version(latent):
            weight = self.weight_of(latent, precomputed[2])
            self.precomputed = (*precomputed[:2], precomputed[2]._replace(weight=None))  # that memory is the reader's
        else:
            weight = self.weight_of(latent)
        if type(latent) is nn.Parameter and not recorded():
            if not self._watch.is_over and self.settings.rule != "fixed":
                self._watch_steps(latent)
            if self._reads_to_watch:
                self._watch_edits(weight)
        return weight

    def precompute(self, mapped: Mapped) -> None:
        """Let reads of the weight take this, until the forward ends or the latent changes."""
        self.precomputed = self.parameter, _version(self.parameter), mapped

    @property
    def can_precompute(self) -> bool:
        """Whether the map may be worked out before the layer runs: whether it will see the latent that is here now."""
        latent = self.owner[0].original if self.owner is not None else None
        # FSDP's shards and functional_call's substitutes are no plain Parameters; under offloading the latent is
        # somewhere else, and in DataParallel's replicas it is the original's, on another device
        return type(latent) is nn.Parameter and latent.device == self.point.device and not self._bypass

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The latent whose weight is ``weight``; outside the ball, its direction at the edge, with a warning."""
        if self.owner is not None and weight.shape != self.parameter.shape:
            expected, got = tuple(self.parameter.shape), tuple(weight.shape)
            raise ValueError(f"{self.name}: expected a weight of shape {expected}, got {got}")
        latent, outside = self.latent_of(weight)
        self._watch.forget()
        if outside:
            self.warn_of_lengths(outside, stacklevel=5)  # through torch's property and setattr to the user's assignment
        return latent

    @contextlib.contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the weight is the latent itself."""
        self._bypass = True
        try:
            yield
        finally:
            self._bypass = False

    def _watch_steps(self, latent: Tensor) -> None:
        changes = self._watch.changes_without_step(self, latent)
        if changes:
            warnings.warn(
                f"{self.name}: its latent weight has changed {changes} times and its point has not moved: no optimizer "
                "step on it has been seen. If its optimizer does not fire torch's step hooks (it may skip "
                "super().__init__()), use hbnn_plugin.ClusterSGD, ClusterAdam or ClusterAdamW, or call "
                "hbnn_plugin.step_points(optimizer) right before its step.",
                stacklevel=2,
            )

    def _watch_edits(self, weight: Tensor) -> None:
        """Warn once when somebody has written into the weight that the last read returned, where nobody sees it."""
        last, self._last_read = self._last_read, None
        self._reads_to_watch -= 1
        if last is not None and checksum(last[0]) != last[1]:
            self._reads_to_watch = 0
            warnings.warn(
                f"{self.name}: something has written into its weight (such as weight.data.clamp_() after a step), and "
                "under a parametrization that is lost. Apply with mode='inplace', which honours it.",
                stacklevel=2,
            )
        if self._reads_to_watch:
            self._last_read = weight.detach(), checksum(weight)


def _version(latent: Tensor) -> int:
    """What goes up when somebody writes into the latent (other than through ``.data``)."""
    return 0 if latent.is_inference() else latent._version


def _lists(module: nn.Module) -> nn.ModuleDict:
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return lists


def _guard_registration(injected: type[nn.Module]) -> None:
    """In the class that torch has injected ``module.weight = nn.Parameter(...)`` would be a KeyError."""

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        epc = find(module).get(name)
        if epc is not None:
            raise ValueError(
                f"{epc.name}: its {name} is computed from a latent, which no other Parameter can replace; assign a "
                "plain tensor to give it a value, or apply with mode='inplace'"
            )
        super(injected, module).register_parameter(name, param)  # type: ignore[misc]

    injected.register_parameter = register_parameter  # type: ignore[method-assign,assignment]


def _remove_parametrization(module: nn.Module, tensor_name: str) -> None:
    """Unlike torch's remove_parametrizations, leave the injected class, which deepcopies share, as it is."""
    lists = _lists(module)
    del lists[tensor_name]
    injected = type(module)
    if len(lists) == 0:
        del module.parametrizations
        module.__class__ = injected.__bases__[0]
    else:  # others are parametrized by somebody else: a class like the injected one without our property
        ours = (tensor_name, "register_parameter", "__dict__", "__weakref__")
        rest = {k: v for k, v in vars(injected).items() if k not in ours}
        module.__class__ = type(injected.__name__, injected.__bases__, rest)
        _guard_registration(module.__class__)


def _restore_parameter(module: nn.Module, tensor_name: str, parameter: nn.Parameter, followers: Sequence[str]) -> None:
    """Register the parameter where it was, in front of its followers: optimizers go by the order."""
    there = list(module._parameters.items())
    place = next((i for i, (name, _) in enumerate(there) if name in followers), len(there))
    module._parameters.clear()
    module._parameters.update([*there[:place], (tensor_name, parameter), *there[place:]])
