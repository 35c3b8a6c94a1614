"""Where a script shows its model: optimizers are built, models wrapped or sharded, checkpoints loaded and saved."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..cluster.epc import find
from ..host.selection import Predicate, binary_convolutions, is_frozen
from ..retrofit.apply import apply, plan
from ..retrofit.binarize import plan_binarization
from ..retrofit.checkpoint import holds_clusters

__all__ = ["Interception"]

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]
"""Is given the arguments of a call that is about to be made; returns the positional ones to make it with."""


class Interception:
    """While started, :func:`hbnn_plugin.apply` is called, with ``options``, on each model that is about to be trained.

    Args:
        options: of apply.
        say: is given the plan of each model, and what else the user should know.
        keep: whether ``models`` holds them, which keeps them alive.

    Attributes:
        applied: whether one of them has its clusters, also where the script itself called apply.
        models: those that an optimizer trains, in order.
    """

    def __init__(self, options: dict[str, Any], say: Callable[[str], None], keep: bool = True) -> None:
        self.options = options
        self.say = say
        self.keep = keep
        self.applied = False
        self.models: list[nn.Module] = []
        self._saved: set[Path] = set()
        self._started = time.time()
        self._originals: list[tuple[Any, str, Any]] = []
        self._met: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of the models that have begun to be sharded
        self._not_kept: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def start(self) -> None:
        """Begin to watch."""
        self._wrap(Optimizer, "__init__", self._before_optimizer)
        for wrapper in (DataParallel, DistributedDataParallel):
            self._wrap(wrapper, "__init__", self._before_wrapper)
        for fsdp in _fsdp_modules():
            if hasattr(fsdp, "fully_shard"):
                self._wrap(fsdp, "fully_shard", self._before_sharding)
            if hasattr(fsdp, "FullyShardedDataParallel"):
                self._wrap(fsdp.FullyShardedDataParallel, "__init__", self._before_flattening)
        self._wrap(nn.Module, "load_state_dict", self._before_load)
        self._wrap(torch, "save", self._before_save)
        self._wrap(torch.multiprocessing, "spawn", self._before_spawn)

    def stop(self) -> None:
        """Put everything back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def saved(self) -> list[Path]:
        """The files that torch.save has written since the start, and what was copied beside them (``best.pth``)."""
        kinds = {(path.parent, path.suffix) for path in self._saved}
        beside = {path for folder, suffix in kinds for path in folder.iterdir() if path.suffix == suffix}
        files = (path for path in beside if path.is_file())
        return sorted(path for path in files if path in self._saved or path.stat().st_mtime >= self._started)

    def _wrap(self, owner: Any, name: str, before: Before) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return original(*before(args, kwargs), **kwargs)

        self._originals.append((owner, name, original))
        setattr(owner, name, wrapped)

    def _before_optimizer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        given = args[1] if len(args) > 1 else kwargs["params"]
        params = given if isinstance(given, Tensor) else list(given)  # a generator yields once
        tensors = {id(t) for t in _tensors(params)}
        for root in _outermost_modules():
            if any(id(p) in tensors for layer in self._layers(root) for p in layer.parameters()):
                self._apply(root)
                self._keep(root)
        if len(args) > 1:
            return (args[0], params, *args[2:])
        kwargs["params"] = params
        return args

    def _before_wrapper(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        module = args[1] if len(args) > 1 else kwargs["module"]
        if any(p.requires_grad for layer in self._layers(module) for p in layer.parameters()):  # no frozen teacher
            self._apply(module)
            self._keep(module)
        return args

    def _before_sharding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """FSDP2: a script shards the parts of a model one after the other; apply has to come before the first."""
        given = args[0] if args else kwargs["module"]
        parts = given if isinstance(given, (list, tuple)) else [given]
        if all(part in self._met for part in parts):
            return args
        for root in _outermost_modules_around(parts):
            self._met.update(root.modules())
            if self._layers(root):
                self._apply(root)
                if self.keep and _ranks() > 1:
                    self._not_kept.add(root)
                    self.say(
                        "of a sharded model no rank alone can count the flips: the report will have fused checkpoints "
                        "only; call hbnn_plugin.flip_ratio(model) in the script, on every rank"
                    )
                self._keep(root)
        return args

    def _before_flattening(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """FSDP1 packs the weights of many layers into one vector, in which no filter can be told."""
        module = args[1] if len(args) > 1 else kwargs["module"]
        if self._layers(module):
            raise ValueError(
                f"FullyShardedDataParallel flattens the weights of {type(module).__name__}, and a point needs its "
                "filter: shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        return args

    def _before_load(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """A script that resumes may load before it builds its optimizer: a checkpoint with clusters needs apply."""
        if holds_clusters(args[1] if len(args) > 1 else kwargs["state_dict"]):
            for root in _outermost_modules_around([args[0]]):
                if self._layers(root):
                    self._apply(root)
        return args

    def _before_spawn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        self.say(
            "torch.multiprocessing.spawn starts processes that this launcher does not reach: what they train, they "
            "train without the plugin. Use torchrun -m hbnn_plugin, or call hbnn_plugin.apply in the script"
        )
        return args

    def _before_save(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        target = args[1] if len(args) > 1 else kwargs.get("f")
        if not isinstance(target, (str, os.PathLike)):
            target = getattr(target, "name", None)  # of an open file
        if isinstance(target, (str, os.PathLike)):
            self._saved.add(Path(target).absolute())
        return args

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of this model that apply would take."""
        where: Predicate | None = self.options.get("where")
        binarize: str | None = self.options.get("binarize")
        if where is not None:
            return [m for name, m in model.named_modules() if where(m, name)]
        if binarize is None:
            chosen = [m for name, m in model.named_modules() if binary_convolutions(m, name)]
        else:
            try:
                chosen = [model.get_submodule(name) for name in plan_binarization(model, binarize, None)]
            except ValueError:  # there is none in this model
                return []
        return [m for m in chosen if not is_frozen(m)]

    def _apply(self, model: nn.Module) -> None:
        if not any(find(module) for module in model.modules()):
            self.say(repr(plan(model, **self.options)))
            apply(model, **self.options)
        self.applied = True

    def _keep(self, model: nn.Module) -> None:
        known = set(model.modules())
        if self.keep and known.isdisjoint([*self.models, *self._not_kept]):
            self.models.append(model)


def _tensors(params: Any) -> Iterable[Tensor]:
    """The parameters that an optimizer is given: tensors, (name, tensor) pairs, or groups of them."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            entry["params"] = entry["params"] if isinstance(entry["params"], Tensor) else list(entry["params"])
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _outermost_modules() -> Iterator[nn.Module]:
    """The modules of this process that are in no other."""
    # not isinstance: it would ask objects for their __class__, and some answer with a warning
    modules: list[nn.Module] = [o for o in gc.get_objects() if nn.Module in type(o).__mro__ and "_modules" in vars(o)]
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    return (module for module in modules if id(module) not in inner)


def _outermost_modules_around(parts: Sequence[nn.Module]) -> list[nn.Module]:
    return [root for root in _outermost_modules() if not set(root.modules()).isdisjoint(parts)]


def _ranks() -> int:
    return torch.distributed.get_world_size()


def _fsdp_modules() -> list[Any]:
    """The places that scripts import FSDP from, in this torch."""
    found = []
    if torch.distributed.is_available():
        for name in ("torch.distributed.fsdp", "torch.distributed._composable.fsdp"):
            with contextlib.suppress(ImportError):
                found.append(importlib.import_module(name))
    return found
