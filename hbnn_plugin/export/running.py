"""Which module of a model is running, also where its parent calls ``module.forward(x)``, past torch's hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["follow"]


@contextlib.contextmanager
def follow(model: nn.Module) -> Iterator[list[str]]:
    """Inside, a list of the qualified names of the modules whose forward runs, the innermost last; the model's is "".

    Args:
        model: its modules carry a ``forward`` of their own meanwhile.
    """
    running: list[str] = []

    def followed(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

        return run

    modules = dict(model.named_modules())
    own = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.__dict__["forward"] = followed(name, module.forward)
    try:
        yield running
    finally:
        for name, module in modules.items():
            del module.__dict__["forward"]
            if own[name] is not None:
                module.__dict__["forward"] = own[name]
