r"""Binary convolutions for a full-precision model of the user's own (``apply(model, binarize=...)``).

Forward (weights, [HBNN] Eqs. 2 and 3):  w_b = α sign(w), α = mean|w| per filter, without gradient.
Forward (activations, "1/1"):            a_b = sign(a).
Backward (Eq. 4):                        ∂L/∂w = ∂L/∂w_b·α·1[|w| ≤ 1],  ∂L/∂a = ∂L/∂a_b·1[|a| ≤ 1].

sign(0) = +1 throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..geometry.passes import traced
from ..host.selection import Predicate

__all__ = ["BinaryConv2d", "Sign", "SignConv2d", "binarize_model", "fuse_binarized", "plan_binarization", "sign"]

_BETWEEN = (nn.BatchNorm1d, nn.LayerNorm, nn.Dropout, nn.Identity)
"""May stand between a linear layer and its ReLU."""

_SHORTCUT_WORDS = ("downsample", "short", "skip", "identity", "proj")


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0].abs() <= 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        masked: Tensor = grad * inside
        return masked

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any], x: Tensor) -> Any:
        return sign(x), in_dims[0]


def sign(x: Tensor) -> Tensor:
    """sign(x) with sign(0) = +1; straight-through gradient 1[|x| ≤ 1] ([HBNN] Eq. 4). Shape and dtype of x."""
    if traced():  # the same in plain ops, which compilers fuse
        clipped = x.clamp(-1, 1)
        return clipped + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - clipped).detach()
    result: Tensor = _StraightThroughSign.apply(x)  # type: ignore[no-untyped-call]
    return result


class Sign(nn.Module):
    """:func:`sign` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return sign(x)


class BinaryConv2d(nn.Conv2d):
    """nn.Conv2d with weight α sign(w), and sign activations if ``sign_input`` is not None. Keys as nn.Conv2d's."""

    sign_input: Sign | None

    @classmethod
    def convert(cls, conv: nn.Conv2d, binarize: str) -> None:
        """Make ``conv`` one of these: the very module, which the model may also hold where nobody can look."""
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.sign_input = Sign() if binarize == "1/1" else None
        conv._warned = False

    def binary_weight(self) -> Tensor:
        """α sign(w), of the weight's shape and dtype."""
        weight = self.weight
        scale = weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
        return scale * sign(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, as nn.Conv2d shapes it."""
        if self.sign_input is not None:
            if self.training and torch.is_grad_enabled() and not self._warned and not traced():
                self._check_input(x)
            x = self.sign_input(x)
        result: Tensor = self._conv_forward(x, self.binary_weight(), self.bias)
        return result

    def _check_input(self, x: Tensor) -> None:
        self._warned = True
        if x.numel() and bool((x >= 0).all()):
            warnings.warn(
                "a binarized convolution's input is never negative, so every activation becomes +1: is there a "
                "functional relu in front of it? binarize='1/1' replaces nn.ReLU modules only: use nn.Hardtanh().",
                stacklevel=4,
            )


class SignConv2d(nn.Conv2d):
    """A fused 1/1 layer: nn.Conv2d whose weight is ±scale, behind the sign of its input."""

    sign_input: Sign
    is_fused: ClassVar = True
    """Its weight is binary for good: no layer for :func:`hbnn_plugin.apply`."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of sign(x)."""
        return super().forward(self.sign_input(x))


def plan_binarization(model: nn.Module, binarize: str, where: Predicate | None) -> set[str]:
    """Names of the convolutions to be binarized; ValueError if there is none or ``binarize`` is unknown.

    By default all nn.Conv2d but the first convolution, a last convolution without a linear layer behind it, and 1×1
    convolutions of shortcuts, as is the custom: those that are strided or have one of :data:`_SHORTCUT_WORDS` in their
    name. First and last are told by the order in which the model registers its layers.
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
        kept = _outer(dict(layers))
        chosen = {n for n, m in convolutions if n not in kept and not _is_shortcut(n, m)}
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
            f"{len(convolutions)} nn.Conv2d, of which the first, a last one and 1×1 "
            "shortcuts stay as they are; name others with where=..."
        )
    return chosen


def _outer(layers: Mapping[str, nn.Module]) -> set[str]:
    """The first convolution and the last layer, which may be a linear layer that is registered before the first."""
    first = next((name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        return set()
    return {first} if next(iter(layers)) != first else {first, [*layers][-1]}


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
