"""What of a full-precision model is binarized (``apply(model, binarize=...)``), and back."""

from __future__ import annotations

import torch
from torch import nn

from ..host.selection import Predicate
from .binary_layers import BinaryConv2d, SignConv2d

__all__ = ["binarize_model", "fuse_binarized", "plan_binarization"]

_BETWEEN = (nn.BatchNorm1d, nn.LayerNorm, nn.Dropout, nn.Identity)
"""May stand between a linear layer and its ReLU."""

_SHORTCUT_WORDS = ("downsample", "short", "skip", "identity", "proj")


def plan_binarization(model: nn.Module, binarize: str, where: Predicate | None) -> set[str]:
    """Names of the convolutions to be binarized; ValueError if there is none or ``binarize`` is unknown.

    By default all nn.Conv2d but the first convolution, the last layer, and 1×1 convolutions of shortcuts, as is the
    custom: those that are strided or have one of :data:`_SHORTCUT_WORDS` in their name. First and last are told by the
    order in which the model registers its layers.
    """
    if binarize not in ("1/1", "1/32"):
        raise ValueError(f"binarize must be None, '1/1' or '1/32' (weights/activations), not {binarize!r}")
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    convolutions = [(n, m) for n, m in layers if type(m) is nn.Conv2d]
    if where is not None:
        chosen = {n for n, m in model.named_modules() if where(m, n)}
        wrong = sorted(chosen - {n for n, _ in convolutions})
        if wrong:
            raise ValueError(f"binarize works on plain nn.Conv2d layers; the predicate also took {', '.join(wrong)}")
    else:
        first = [n for n, m in layers if isinstance(m, nn.Conv2d)][:1]
        last = [n for n, _ in layers][-1:]
        chosen = {n for n, m in convolutions if n not in (*first, *last) and not _is_shortcut(n, m)}
    if "" in chosen:
        raise ValueError(
            "the model is itself the convolution to be binarized, and nothing holds it in which it could be replaced; "
            "put it into an nn.Sequential"
        )
    if not chosen and any(isinstance(m, BinaryConv2d) for m in model.modules()):
        raise ValueError("the convolutions are binarized already; hbnn_plugin.fuse(model) makes the model plain again")
    if not chosen:
        raise ValueError(
            f"binarize={binarize!r} found no convolution to binarize in {type(model).__name__}: it has "
            f"{len(convolutions)} nn.Conv2d, of which the first, one that is the last layer, and 1×1 "
            "shortcuts stay as they are; name others with where=..."
        )
    return chosen


def _is_shortcut(name: str, conv: nn.Conv2d) -> bool:
    pointwise = all(k == 1 for k in conv.kernel_size)
    strided = any(s > 1 for s in conv.stride)
    return pointwise and (strided or any(word in name.lower() for word in _SHORTCUT_WORDS))


def _relus(model: nn.Module) -> list[nn.ReLU]:
    """Every nn.ReLU but those behind a linear layer and its normalization: they belong to a real-valued classifier."""
    found: list[nn.ReLU] = []
    previous: nn.Module | None = None
    for module in model.modules():
        if type(module) is nn.ReLU and not isinstance(previous, nn.Linear):
            found.append(module)
        if next(module.children(), None) is None and not isinstance(module, _BETWEEN):
            previous = module
    return found


def binarize_model(model: nn.Module, binarize: str, names: set[str]) -> None:
    """Turn the named nn.Conv2d into :class:`BinaryConv2d`, and for 1/1 nn.ReLU into nn.Hardtanh, in place."""
    relus = _relus(model) if binarize == "1/1" else []
    for name, module in list(model.named_modules()):
        if name in names and type(module) is nn.Conv2d:
            BinaryConv2d.convert(module, binarize)
    for relu in relus:
        relu.__class__ = nn.Hardtanh  # type: ignore[assignment]
        relu.min_val, relu.max_val = -1.0, 1.0  # type: ignore[assignment]


@torch.no_grad()
def fuse_binarized(model: nn.Module) -> None:
    """Turn every :class:`BinaryConv2d` into nn.Conv2d (1/32) or :class:`SignConv2d` (1/1) of equal output, in place."""
    done: set[int] = set()
    for module in model.modules():
        if type(module) is BinaryConv2d:
            if id(module.weight) not in done:  # tied
                module.weight.copy_(module.binary_weight())
                done.add(id(module.weight))
            del module.__dict__["_warned"]
            if module.sign_input is None:
                del module.sign_input
                module.__class__ = nn.Conv2d  # type: ignore[assignment]
            else:
                module.__class__ = SignConv2d  # type: ignore[assignment]
