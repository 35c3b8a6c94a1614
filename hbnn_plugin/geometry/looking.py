"""When values may be looked at, and what is told from them; and when a compiler looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dtypes import scalar_dtype

__all__ = ["checksum", "may_look", "not_compiled", "recorded", "traced"]

F = TypeVar("F", bound=Callable[..., Any])


def may_look(x: Tensor) -> bool:
    """Whether x's values are known without waiting: on a CPU. Elsewhere looking at them costs a synchronisation."""
    return x.is_cpu


def checksum(x: Tensor) -> float:
    """The sum of all of x, for telling whether it has changed."""
    return float(x.detach().to(scalar_dtype(x.device)).sum().nan_to_num())


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is looking: then plain operations, and nothing kept."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state())


def not_compiled(function: F) -> F:
    """Bookkeeping inside what may be compiled, such as an optimizer's step: a compiler would guard on every count."""
    eager: F = torch.compiler.disable(function)
    return eager


def recorded() -> bool:
    """Whether a CUDA graph is being recorded, which looking at a value would end with an error."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
