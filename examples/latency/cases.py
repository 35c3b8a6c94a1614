"""What is measured, in order: the first figures first."""

from __future__ import annotations

from latency.equality import Equality
from latency.inference import Inference
from latency.networks import Network

__all__ = ["EQUALITY", "INFERENCE"]

_NETWORKS = [
    *(Network("irnet", arch) for arch in ("resnet18", "resnet34", "vgg_small")),
    *(Network("irnet", arch, 224) for arch in ("resnet18_imagenet", "resnet34_imagenet")),
]

_ONE = [Inference(network, 1, 1) for network in _NETWORKS]
_OTHERS = [Inference(n, batch, threads) for batch, threads in ((1, 2), (32, 1), (32, 2)) for n in _NETWORKS]
_HOSTS = [Inference(Network(host, "resnet18"), 1, 1) for host in ("recu", "siman", "plain")]

INFERENCE = _ONE + _HOSTS + _OTHERS
EQUALITY = [
    Equality(Network("irnet", "resnet18"), 800),
    *(Equality(Network(host, "resnet20"), 300) for host in ("recu", "siman", "plain")),
]
