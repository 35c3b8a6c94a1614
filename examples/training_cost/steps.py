"""Whole training steps: the host alone and in the plugin's two modes. Time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import hbnn_plugin
from hosts import binary_layers, get_host
from hosts.networks import NETWORKS
from measuring import in_turns, median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARMS", "BARE", "WATCHED", "measure_memory", "measure_step"]

BARE = "bare host"
ARMS: dict[str, dict[str, Any] | None] = {
    BARE: None,
    "parametrize": {"mode": "parametrize"},
    "in-place": {"mode": "inplace"},
    "parametrize, Möbius rule": {"mode": "parametrize", "rule": "mobius"},
}
"""Options of ``hbnn_plugin.apply``; None is the host alone."""
WATCHED = 22
"""Forwards after which the plugin's self-checks have ended."""


def _trainings(host: str, arch: str, batch: int, kind: str) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """For each arm the model, and what makes one training step."""
    return {arm: _training(host, arch, batch, kind, options) for arm, options in ARMS.items()}


def _training(
    host_name: str, arch: str, batch: int, kind: str, options: dict[str, Any] | None
) -> tuple[nn.Module, Callable[[], None]]:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = get_host(host_name, arch)
    model = NETWORKS[arch](host.conv, num_classes=10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options is not None:
        hbnn_plugin.apply(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    with torch.no_grad():
        for _ in range(WATCHED):
            model(images[:2])
    network: Callable[..., Any] = torch.compile(model) if kind == "compiled" else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return model, step


def measure_step(host: str, arch: str, batch: int, kind: str, turns: int) -> dict[str, Any]:
    """Milliseconds a step of each arm, and its ratio to the bare host; ``kind`` is eager, compiled or bf16."""
    torch.compiler.reset()
    seconds = in_turns({arm: step for arm, (_, step) in _trainings(host, arch, batch, kind).items()}, turns)
    return {
        "milliseconds": {arm: median([1e3 * s for s in times]).as_dict for arm, times in seconds.items()},
        "ratio to the bare host": {arm: ratio(t, seconds[BARE]).as_dict for arm, t in seconds.items() if arm != BARE},
    }


def measure_memory(host: str, arch: str, batch: int) -> dict[str, Any]:
    """Memory beyond the bare host's, in copies of the binary layers' weights: held between steps, and at a step's peak.

    Held are buffers and flip references; the peak is counted from every allocation of one step that torch's profiler
    sees, atop what is held.
    """
    held, peak = {}, {}
    weights = 1
    for arm, (model, step) in _trainings(host, arch, batch, "eager").items():
        weights = sum(layer.weight.numel() * 4 for _, layer in binary_layers(model))
        step()
        state = model.state_dict().values()
        held[arm] = sum(t.numel() * t.element_size() for t in state)
        peak[arm] = held[arm] + _peak(step)
    return {
        "copies held": {arm: round((held[arm] - held[BARE]) / weights, 3) for arm in held if arm != BARE},
        "copies at the peak": {arm: round((peak[arm] - peak[BARE]) / weights, 3) for arm in peak if arm != BARE},
        "weights, MB": round(weights / 1e6, 2),
    }


def _peak(step: Callable[[], None]) -> int:
    """Bytes that one step has allocated at most at a time."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    now = most = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
