"""How many operators of one training step compute something: on a GPU each is a kernel to launch.

Counted on torch's meta device, whose tensors have no values, as the plugin would run on a GPU, where it looks at none.
(In-place mode looks at values in each step, which meta tensors refuse; it is not counted.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hbnn_plugin
from hosts import get_host
from hosts.networks import NETWORKS
from training_cost.steps import ARMS, WATCHED

__all__ = ["measure_launches"]

_FREE = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size")
"""Beginnings of the names of operators that launch nothing, beside views."""


class _Launches(TorchDispatchMode):
    """Counts operators; one for several tensors as one, if they are of one shape, as torch's CUDA kernels do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_foreach"):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and isinstance(arg[0], torch.Tensor)]
            alike = all(one.shape == other.shape for others in lists[1:] for one, other in zip(lists[0], others))
            self.count += 1 if alike else len(lists[0])
        elif not (func.is_view or name in ("detach", "alias") or name.startswith(_FREE)):
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure_launches(host: str, arch: str, dtype: torch.dtype) -> dict[str, Any]:
    """For each arm that looks at no value its launches in forward, backward and step (SGD, its foreach kernels)."""
    arms = {arm: options for arm, options in ARMS.items() if options is None or options["mode"] != "inplace"}
    found = {arm: _launches(host, arch, options, dtype) for arm, options in arms.items()}
    return {"launches": {arm: dict(zip(("forward", "backward", "step"), counts)) for arm, counts in found.items()}}


def _launches(host_name: str, arch: str, options: dict[str, Any] | None, dtype: torch.dtype) -> list[int]:
    torch.manual_seed(0)
    host = get_host(host_name, arch)
    model = NETWORKS[arch](host.conv, num_classes=10)
    if options is not None:
        hbnn_plugin.apply(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    with torch.no_grad():
        for _ in range(WATCHED):
            model(torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()  # points that have moved are watched no more
    model.to("meta", dtype).zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True)
    images = torch.empty(8, 3, 32, 32, device="meta", dtype=dtype)
    labels = torch.empty(8, device="meta", dtype=torch.long)
    for _ in range(2):  # the first makes the optimizer's state
        optimizer.zero_grad()
        forward, backward, step = _Launches(), _Launches(), _Launches()
        with forward:
            loss = F.cross_entropy(model(images), labels)
        with backward:
            loss.backward()
        with step:
            optimizer.step()
    return [forward.count, backward.count, step.count]
