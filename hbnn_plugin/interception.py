"""Where a training script shows its model: the constructors of optimizers and of parallel wrappers, and torch.save."""

from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from .cluster import find
from .retrofit import apply, plan
from .selection import Predicate, binary_convolutions

__all__ = ["Interception"]

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]
"""Is given the arguments of a call that is about to be made; returns the positional ones to make it with."""


class Interception:
    """While started, :func:`hbnn_plugin.apply` is called, with ``options``, on each model that is about to be trained.

    Attributes:
        models: those it was called on, in order.
    """

    def __init__(self, options: dict[str, Any], say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        self.models: list[nn.Module] = []
        self._saved: set[Path] = set()
        self._started = time.time()
        self._originals: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        """Begin to watch."""
        self._wrap(Optimizer, "__init__", self._before_optimizer)
        for wrapper in (DataParallel, DistributedDataParallel):
            self._wrap(wrapper, "__init__", self._before_wrapper)
        self._wrap(torch, "save", self._before_save)

    def stop(self) -> None:
        """Put everything back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def saved(self) -> list[Path]:
        """The files that torch.save has written since the start, and what was copied beside them (``best.pth``)."""
        kinds = {(path.parent, path.suffix) for path in self._saved}
        beside = (path for folder, suffix in kinds for path in folder.glob(f"*{suffix}"))
        return sorted(path for path in beside if path.is_file() and path.stat().st_mtime >= self._started)

    def _wrap(
        self, owner: Any, name: str, before: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, ...]]
    ) -> None:
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
        for root in _roots_holding(tensors, self.options.get("where", binary_convolutions)):
            self._apply(root)
        if len(args) > 1:
            return (args[0], params, *args[2:])
        kwargs["params"] = params
        return args

    def _before_wrapper(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        module = args[1] if len(args) > 1 else kwargs["module"]
        predicate = self.options.get("where", binary_convolutions)
        if any(predicate(m, name) for name, m in module.named_modules()):
            self._apply(module)
        return args

    def _before_save(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        target = args[1] if len(args) > 1 else kwargs.get("f")
        if isinstance(target, (str, os.PathLike)):
            self._saved.add(Path(target).absolute())
        return args

    def _apply(self, model: nn.Module) -> None:
        if any(find(module) for module in model.modules()):
            return
        self.say(repr(plan(model, **self.options)))
        self.models.append(apply(model, **self.options))


def _tensors(params: Any) -> Iterable[Tensor]:
    """The parameters that an optimizer is given: tensors, (name, tensor) pairs, or groups of them."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            entry["params"] = entry["params"] if isinstance(entry["params"], Tensor) else list(entry["params"])
            yield from _tensors(entry["params"])
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def _roots_holding(tensors: set[int], predicate: Predicate) -> list[nn.Module]:
    """The outermost modules of this process that hold a selected layer with one of these parameters."""
    # not isinstance: it would ask objects for their __class__, and some answer with a warning
    modules: list[nn.Module] = [o for o in gc.get_objects() if nn.Module in type(o).__mro__ and "_modules" in vars(o)]
    inner = {id(child) for module in modules for child in module._modules.values() if child is not None}
    roots = []
    for module in modules:
        if id(module) not in inner:
            layers = [m for name, m in module.named_modules() if predicate(m, name)]
            if any(id(p) in tensors for layer in layers for p in layer._parameters.values()):
                roots.append(module)
    return roots
