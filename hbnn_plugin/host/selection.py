"""Which layers get the cluster: one predicate ``(module, qualified_name) -> bool``, and helpers that return one."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

__all__ = [
    "LIBRARIES",
    "Predicate",
    "Selected",
    "binary_convolutions",
    "by_class",
    "by_name",
    "is_frozen",
    "names_in_methods",
    "own_class",
    "select",
]

Predicate = Callable[[nn.Module, str], bool]

LIBRARIES = frozenset(
    """
    torch torchvision torchao timm peft transformers diffusers detectron2 mmcv mmengine mmdet mmseg loralib geoopt
    lightning pytorch_lightning accelerate monai kornia fastai segmentation_models_pytorch brevitas
    """.split()  # noqa: SIM905
)
"""Their convolution classes standardize, adapt or wrap a weight; none of them binarizes it by being what it is."""

_CONVOLUTION_NAMES = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d _conv_forward".split()  # noqa: SIM905
)


class Selected(NamedTuple):
    """One weight tensor of one layer."""

    name: str
    """The layer's qualified name."""
    module: nn.Module
    tensor_name: str
    shape: tuple[int, ...]
    """Logical shape of the weight."""
    unit_dims: tuple[int, ...]
    """The dimensions of ``shape`` that count output units."""

    @property
    def label(self) -> str:
        """What messages call the layer: its name, or its class where it is the model itself."""
        return self.name or own_class(self.module).__name__

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.tensor_name)
        return weight


def binary_convolutions(module: nn.Module, name: str) -> bool:
    """The default predicate: convolutions of a class of the host's own.

    That is a subclass of torch's convolutions that is neither torch's nor a well-known library's, or a module of a
    class of the host's own whose forward calls a convolution with a parameter of its own (also one stored flat).
    """
    cls = own_class(module)
    if cls.__module__.split(".")[0] in LIBRARIES or getattr(cls, "is_fused", False):
        return False
    if isinstance(module, _ConvNd):
        return True
    return _weight_of(module) is not None and bool(_CONVOLUTION_NAMES & names_in_methods(cls))


def by_name(*patterns: str) -> Predicate:
    """Layers whose qualified name a regular expression finds (``re.search``). Raises TypeError for anything else."""
    if not all(isinstance(pattern, (str, re.Pattern)) for pattern in patterns):
        raise TypeError(f"by_name takes regular expressions as arguments of their own, not {patterns!r}")
    compiled = [re.compile(pattern) for pattern in patterns]

    def predicate(module: nn.Module, name: str) -> bool:
        return any(pattern.search(name) for pattern in compiled) and _weight_of(module) is not None

    predicate.__qualname__ = f"by_name({', '.join(map(repr, patterns))})"
    return predicate


def by_class(*classes: type[nn.Module]) -> Predicate:
    """Layers that are instances of one of the classes. Raises TypeError for what is no class."""
    if not all(isinstance(cls, type) for cls in classes):
        raise TypeError(f"by_class takes classes as arguments of their own, not {classes!r}")

    def predicate(module: nn.Module, name: str) -> bool:
        return isinstance(module, classes)

    predicate.__qualname__ = f"by_class({', '.join(c.__name__ for c in classes)})"
    return predicate


def is_frozen(module: nn.Module) -> bool:
    """Whether the module's own weight takes no gradient, such as a convolution that shifts colours by a constant."""
    weight = module._parameters.get(_weight_of(module) or "")
    return weight is not None and weight.is_floating_point() and not weight.requires_grad


def select(model: nn.Module, where: Predicate) -> Iterator[tuple[str, nn.Module, Selected | None]]:
    """Every module that the predicate takes, with its weight, or None where no weight can be told."""
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":  # torch's own bookkeeping
            continue
        if where(module, name):
            weight_name = _weight_of(module)
            if weight_name is None:
                yield name, module, None
            else:
                yield name, module, Selected(name, module, weight_name, *_layout(module, weight_name))


def own_class(module: nn.Module) -> type:
    """The module's class as its author wrote it (parametrize puts a class of its own in front)."""
    return next(c for c in type(module).__mro__ if c.__module__ != "torch.nn.utils.parametrize")


def names_in_methods(cls: type) -> set[str]:
    """The names that methods mention which the class, or a base of the host's own, defines; decorated ones too."""
    named: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in LIBRARIES:
            for member in vars(base).values():
                method: Any = member.fget if isinstance(member, property) else member
                code = getattr(inspect.unwrap(method), "__code__", None)
                named.update(_names_in(code) if code is not None else ())
    return named


def _names_in(code: CodeType) -> Iterator[str]:
    """Also those of the functions, lambdas and comprehensions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _declared_shape(module: nn.Module) -> tuple[int, ...] | None:
    shape = getattr(module, "shape", None)
    if isinstance(shape, (tuple, list)) and len(shape) >= 2 and all(isinstance(n, int) for n in shape):
        return tuple(shape)
    return None


def _weight_of(module: nn.Module) -> str | None:
    """The name of the module's own weight: ``weight``, or else its only parameter of two dimensions or more."""
    parametrized = list(getattr(module, "parametrizations", {}))
    own = [
        n
        for n, p in module._parameters.items()
        if isinstance(p, UninitializedParameter) or (p is not None and p.ndim >= 2)
    ]
    candidates = parametrized + own
    if "weight" in candidates:
        return "weight"
    return candidates[0] if len(candidates) == 1 else None


def _layout(module: nn.Module, tensor_name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Logical shape of the weight and the dimensions that count output units."""
    weight = getattr(module, tensor_name)
    if isinstance(weight, UninitializedParameter):
        return (), ()
    if isinstance(module, _ConvTransposeNd):  # (in, out/groups, ...)
        inputs, outputs, *kernel = weight.shape
        if module.groups == 1:
            return tuple(weight.shape), (1,)
        return (module.groups, inputs // module.groups, outputs, *kernel), (0, 2)
    declared = _declared_shape(module)
    if declared is not None and tuple(weight.shape) != declared and weight.numel() == math.prod(declared):
        return declared, (0,)
    return tuple(weight.shape), (0,)
