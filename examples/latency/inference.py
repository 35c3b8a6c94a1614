"""Inference of one network, timed in every way in turns, and what each way computes."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hbnn_plugin.export.agreement import agreement
from latency.networks import Network
from latency.ways import BINARY, FUSED, HOST, ways
from measuring import in_turns, median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Inference"]

SHORTEST = 0.03
"""Seconds; a way is run as often in a turn as it takes to last so long."""
FEWEST, MOST = 7, 60
"""Turns."""


@dataclass(frozen=True)
class Inference:
    """A case."""

    network: Network
    batch: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"

    def measure(self, seconds: float) -> dict[str, Any]:
        """Figures from turns that take about so many seconds together, and at least seven."""
        found = ways(self.network.build(), self.network.noise(self.batch), self.threads)
        outputs = {name: torch.from_numpy(arm().copy()) for name, arm in found.arms.items()}
        repeats = {name: math.ceil(SHORTEST / _shortest(arm)) for name, arm in found.arms.items()}
        arms = {name: _repeated(arm, repeats[name]) for name, arm in found.arms.items()}
        start = time.perf_counter()
        in_turns(arms, turns=1, warm_up=1)
        turns = round(2 * seconds / (time.perf_counter() - start))
        times = {
            name: [t / repeats[name] for t in spent]
            for name, spent in in_turns(arms, min(max(turns, FEWEST), MOST)).items()
        }
        pair = {name: arms[name] for name in (HOST, FUSED)}  # these have to be told apart more finely
        pair_turns = round(seconds / sum(median(times[name]).median * repeats[name] for name in pair))
        alone = in_turns(pair, min(max(pair_turns, FEWEST), MOST))
        return {
            "milliseconds": {name: median([1e3 * t for t in spent]).as_dict for name, spent in times.items()},
            "times as long as binary": {name: ratio(t, times[BINARY]).as_dict for name, t in times.items()},
            "fused / host": ratio(alone[FUSED], alone[HOST]).as_dict,
            "turns": len(times[BINARY]),
            "load": round(os.getloadavg()[0], 1),
            "agreement with the host": {
                name: agreement(output, outputs[HOST])._asdict() for name, output in outputs.items()
            },
            "layers": {layer.name: layer.kernel or layer.note for layer in found.xnor.layers},
            "binary layers": sum(layer.binary for layer in found.xnor.layers),
            "profiles": found.profiles,
        }


def _shortest(arm: Callable[[], object]) -> float:
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        arm()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _repeated(arm: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            arm()

    return run
