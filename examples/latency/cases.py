"""What is measured, in order: the first figures first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from latency.equality import Equality
from latency.inference import Inference
from latency.networks import Network
from training_cost.steps import measure_step

__all__ = ["EQUALITY", "INFERENCE", "QUICK", "TRAINING", "Training"]


@dataclass(frozen=True)
class Training:
    """A training step of the host alone and with HBNN, at 32 × 32 pixels."""

    host: str
    arch: str
    batch: int
    threads: int
    turns: int = 8

    @property
    def name(self) -> str:
        return f"a step of {self.host} {self.arch}, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"

    def measure(self) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        return measure_step(self.host, self.arch, self.batch, "eager", self.turns)


_NETWORKS = [
    *(Network("irnet", arch) for arch in ("resnet18", "resnet34", "vgg_small")),
    *(Network("irnet", arch, 224) for arch in ("resnet18_imagenet", "resnet34_imagenet")),
]

_ONE = [Inference(network, 1, 1) for network in _NETWORKS]
_OTHERS = [Inference(n, batch, threads) for batch, threads in ((1, 2), (32, 1), (32, 2)) for n in _NETWORKS]
_HOSTS = [Inference(Network(host, "resnet18"), 1, 1) for host in ("recu", "siman", "plain")]

INFERENCE = _ONE + _HOSTS + _OTHERS
TRAINING = [Training("irnet", arch, 32, threads) for threads in (1, 2) for arch in ("resnet18", "vgg_small")]
QUICK = (_ONE[0], TRAINING[0])
EQUALITY = [
    Equality(Network("irnet", "resnet18"), 800),
    *(Equality(Network(host, "resnet20"), 300) for host in ("recu", "siman", "plain")),
]
