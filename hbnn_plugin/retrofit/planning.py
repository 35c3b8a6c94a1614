"""What apply would do, checked and printable before anything is changed."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from typing import get_args

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from ..cluster.epc import alive, find
from ..cluster.settings import Mode, Settings
from ..diagnostics.tables import table
from ..host.idioms import loads_by_itself, reason_for_inplace
from ..host.selection import Predicate, Selected, is_frozen, own_class, select
from ..host.sharding import is_sharded

__all__ = ["Plan", "check_model", "check_where", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The layers that apply would take, in order; ``repr`` is a table."""

    settings: Settings
    """The options, defaults filled in."""
    layers: tuple[Selected, ...]
    """Name, module, weight and shape of each."""
    mode: Mode
    """``"parametrize"`` or ``"inplace"``."""
    reason: str | None
    """Why the mode is not ``"parametrize"``, if it was left to the plugin."""
    frozen: tuple[str, ...]
    """Layers that were left out because their weight takes no gradient; ``where`` would take them."""
    binarize: str | None
    """What a full-precision model is made first: ``"1/1"``, ``"1/32"`` or nothing."""

    def __len__(self) -> int:
        return len(self.layers)

    def points(self, layer: Selected) -> int:
        """How many points the layer gets."""
        covered = self.settings.point_dims(layer.shape, layer.unit_dims)
        return math.prod(n for d, n in enumerate(layer.shape) if d not in covered)

    def __repr__(self) -> str:
        rows = [
            (s.label, own_class(s.module).__name__, s.tensor_name, "×".join(map(str, s.shape)), str(self.points(s)))
            for s in self.layers
        ]
        title = f"EPC on {len(self.layers)} layer(s): {self.settings}"
        if self.binarize:
            title += f"; binarize={self.binarize!r}"
        if self.mode == "inplace":
            title += "; mode='inplace'" + (f", because {self.reason}" if self.reason else "")
        if self.frozen:
            title += f"; left out, because frozen: {', '.join(self.frozen)}"
        return table(title, ("layer", "class", "tensor", "shape", "points"), rows)


def make_plan(
    model: nn.Module,
    settings: Settings,
    where: Predicate,
    mode: Mode | None,
    binarize: str | None = None,
    by_default: bool = False,
) -> Plan:
    """Select, choose the mode and check. Raises ValueError (TypeError for a model that is none) naming all problems.

    ``by_default``: nobody has asked for ``where``, which then leaves frozen layers out.
    """
    if mode not in (None, *get_args(Mode)):
        raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, or None, not {mode!r}")
    wrapper = check_model(model, mode)
    layers: list[Selected] = []
    frozen: list[str] = []
    problems: list[str] = []
    for name, module, selected in select(model, where):
        if by_default and is_frozen(module):
            frozen.append(name or own_class(module).__name__)
            continue
        problem = _no_weight(module) if selected is None else _problem(selected, settings)
        if problem is None and mode == "parametrize":
            problem = _no_subclass(own_class(module))
        if problem is not None:
            cls = own_class(module).__name__
            problems.append(f"{name or cls} ({cls}): {problem}")
        elif selected is not None:
            layers.append(selected)
    if _applied_before(layers):
        gc.collect()  # what torch's remove_parametrizations has left is in a cycle
        problems += _applied_before(layers)
    ties = _broken_ties(model, layers)
    if mode == "parametrize":
        problems += [f"{tie}: select that too, or apply with mode='inplace'" for tie in ties]
    if problems:
        raise ValueError("nothing was changed, because of\n  " + "\n  ".join(problems))
    if not layers:
        raise ValueError(_nothing_selected(model, None if by_default else where, frozen))
    reason = None
    if mode is None:
        reason = wrapper or next(iter(ties), None) or loads_by_itself(model, layers)
        reason = reason or reason_for_inplace(layers, binarized_later=binarize is not None)
        mode = "inplace" if reason else "parametrize"
    return Plan(settings, tuple(layers), mode, reason, tuple(frozen), binarize)


def check_where(where: object) -> None:
    """Refuse what is no predicate."""
    if isinstance(where, type):
        raise TypeError(f"where must be callable as (module, name) -> bool: by_class({where.__name__}), not the class")
    if where is not None and not callable(where):
        raise TypeError(f"where must be callable as (module, name) -> bool, such as by_name({where!r}), not {where!r}")


def check_model(model: nn.Module, mode: Mode | None = None) -> str | None:
    """Refuse what is not a module, or sharded; returns what wraps the model, which takes in-place mode."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    wrapper = None
    for name, module in model.named_modules():
        label = f"{name or 'the model'} is wrapped in {type(module).__name__}"
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is sharded by {type(module).__name__}, which has taken its weights apart: call "
                "hbnn_plugin.apply first, shard afterwards"
            )
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            if mode == "parametrize":
                raise ValueError(
                    f"{label}, which would miss the latent weights' gradients: call hbnn_plugin.apply first, wrap "
                    "afterwards, or apply with mode='inplace'"
                )
            wrapper = label
    return wrapper


def _no_weight(module: nn.Module) -> str:
    if {"weight_g", "weight_v"} <= set(module._parameters):
        return "its weight is already parametrized by torch.nn.utils.weight_norm; remove that first"
    if next(module.parameters(recurse=False), None) is None:
        return "it holds no parameter itself; select the layers inside it"
    return "it has no single weight of two dimensions or more"


def _no_subclass(cls: type) -> str | None:
    """What happens as torch's parametrizations make a subclass of a layer's class, if that is an error."""
    try:
        type(cls.__name__, (cls,), {})
    except Exception as error:
        return f"its class refuses to be subclassed, as a parametrization does ({error}); apply with mode='inplace'"
    return None


def _broken_ties(model: nn.Module, layers: list[Selected]) -> list[str]:
    """Selected weights that another layer uses too: under a parametrization it would take the latent for a weight."""
    chosen = {(id(s.module), s.tensor_name) for s in layers}
    by_weight = _by_weight(layers)
    return [
        f"{by_weight[id(parameter)].label} has its weight tied to {name}.{tensor_name}, which is not selected"
        for name, module in model.named_modules()
        for tensor_name, parameter in module._parameters.items()
        if id(parameter) in by_weight
        and (id(module), tensor_name) not in chosen
        and not isinstance(module, ParametrizationList)
    ]


def _applied_before(layers: list[Selected]) -> list[str]:
    """Selected weights that are tied to a latent."""
    latents = {id(epc.parameter): epc for epc in alive()}
    return [
        f"{s.label}: its weight is tied to {latents[key].name}, which apply was called on before"
        for key, s in _by_weight(layers).items()
        if key in latents
    ]


def _by_weight(layers: list[Selected]) -> dict[int, Selected]:
    return {id(s.weight): s for s in layers if s.tensor_name in s.module._parameters}


def _problem(selected: Selected, settings: Settings) -> str | None:
    module, tensor_name = selected.module, selected.tensor_name
    if tensor_name.endswith("_orig"):
        return f"its {tensor_name.removesuffix('_orig')} is parametrized by spectral_norm or prune; remove that first"
    if tensor_name in find(module):
        return "hbnn_plugin.apply was called on it before; fuse(model) undoes that"
    if tensor_name in getattr(module, "parametrizations", {}):
        owner = type(module.parametrizations[tensor_name][0]).__name__  # type: ignore[index]
        return f"its {tensor_name} is already parametrized by {owner}; remove that parametrization first"
    parameter = module._parameters[tensor_name]
    if isinstance(parameter, UninitializedParameter):
        return f"its {tensor_name} is not initialized yet; run the lazy module once, then apply"
    weight = selected.weight
    if is_sharded(weight):
        return f"its {tensor_name} is already sharded; call hbnn_plugin.apply first, shard afterwards"
    if not weight.is_floating_point():
        return f"its {tensor_name} is {weight.dtype}, not a floating-point tensor"
    if weight.is_meta:
        return f"its {tensor_name} is on the meta device; materialize and initialize the model first"
    if weight.numel() == 0:
        return f"its {tensor_name} is empty (shape {tuple(weight.shape)})"
    bad = int((~weight.detach().isfinite()).sum())
    if bad:
        return f"its {tensor_name} holds {bad} non-finite value(s) of {weight.numel()}; repair or re-initialize it"
    if settings.space == "sphere":
        dims = settings.point_dims(selected.shape, selected.unit_dims)
        zeros = int((weight.detach().reshape(selected.shape).abs().amax(dims) == 0).sum())
        if zeros:
            return f"{zeros} of its {settings.per}s are zero, which has no place on the sphere; initialize them"
    return None


def _nothing_selected(model: nn.Module, where: Predicate | None, frozen: list[str]) -> str:
    if frozen:
        return (
            f"every binary convolution of {type(model).__name__} is frozen: {', '.join(frozen)}. Let their weights "
            "take a gradient (requires_grad_(True)) first, or name them with where=hbnn_plugin.by_name(...)"
        )
    classes: dict[str, int] = {}
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            classes[type(module).__name__] = classes.get(type(module).__name__, 0) + 1
    looked_at = ", ".join(f"{n} {cls}" for cls, n in sorted(classes.items())) or "no module with parameters"
    if where is not None:
        asked = getattr(where, "__qualname__", repr(where))
        return f"the predicate {asked} selected no layer of {type(model).__name__} (looked at: {looked_at})"
    return (
        f"found no binary convolution in {type(model).__name__} (looked at: {looked_at}). By default convolutions of a "
        "class of your own are taken, not plain torch layers. Name the layers with where=hbnn_plugin.by_name(...) or "
        'by_class(...), or let apply(model, binarize="1/1") binarize a full-precision model.'
    )
