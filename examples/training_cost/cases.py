"""What is measured, by section."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from training_cost.launches import measure_launches
from training_cost.maps import measure_map, one_layer, weights_of
from training_cost.steps import measure_memory, measure_step

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One line's worth of measurement."""

    section: str
    name: str
    measure: Callable[[int], dict[str, Any]]
    """Given the number of turns."""
    turns: int


def _map(points: int, weights: int = 512 * 512 * 9, *, compiled: bool = True) -> Callable[[int], dict[str, Any]]:
    return lambda turns: measure_map(one_layer(points, weights), turns, compiled)


def _network(arch: str, per: str) -> Callable[[int], dict[str, Any]]:
    return lambda turns: measure_map(weights_of(arch, per), turns, compiled=False)


def _step(host: str, arch: str, batch: int, kind: str = "eager") -> Case:
    name = f"{host} {arch} batch {batch}" + f", {kind}" * (kind != "eager")
    turns = 24 if batch >= 128 else 48  # with ten, ratios scatter by 5 %
    return Case("step", name, partial(measure_step, host, arch, batch, kind), turns)


def _launches(arch: str, dtype: torch.dtype) -> Callable[[int], dict[str, Any]]:
    return lambda _: measure_launches("irnet", arch, dtype)


CASES = [
    Case("map", "2.36 M weights, a point per filter", _map(512), 40),
    Case("map", "2.36 M weights, one point", _map(1), 40),
    *(
        Case("map", f"all layers of {arch}, a point per {per}", _network(arch, per), 12)
        for arch in ("resnet18", "resnet34_imagenet")
        for per in ("filter", "layer")
    ),
    *(_step("irnet", "resnet20", batch) for batch in (128, 32, 256)),
    *(_step("irnet", "resnet18", batch) for batch in (128, 32, 256)),
    *(_step("irnet", "vgg_small", batch) for batch in (128, 32)),
    *(_step("recu", "resnet20", batch) for batch in (128, 32)),
    _step("recu", "resnet18", 128),
    *(_step("irnet", arch, 128, "compiled") for arch in ("resnet20", "resnet18")),
    _step("irnet", "resnet20", 128, "bf16"),
    *(
        Case("launches", f"irnet {arch}, {kind}", _launches(arch, dtype), 1)
        for arch in ("resnet20", "resnet18")
        for kind, dtype in (("float32", torch.float32), ("bf16 weights", torch.bfloat16))
    ),
    Case("memory", "irnet resnet18 batch 32", lambda _: measure_memory("irnet", "resnet18", 32), 1),
    Case("memory", "irnet resnet20 batch 32", lambda _: measure_memory("irnet", "resnet20", 32), 1),
    *(Case("growth", f"2.36 M weights in {n} point(s)", _map(n, compiled=False), 30) for n in (1, 8, 64, 512)),
    *(
        Case("growth", f"{m / 1e6:.2f} M weights in 64 points", _map(64, m, compiled=False), 30)
        for m in (36_864, 147_456, 589_824, 9_437_184)
    ),
]
