"""Smooth networks in either mode, in float64, and what must hold of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_hosts import SmoothConv, TinyNet, clusters, latents, points
from training_helpers import F64, applied

CURVED = {"radius": 0.5}


def smooth(mode: str = "inplace", seed: int = 0, **options: Any) -> TinyNet:
    return applied(SmoothConv, seed, F64, mode=mode, **{**CURVED, **options})


def mapped(net: nn.Module) -> bool:
    """Whether the host's weights are the mapped latents, to the last bit."""
    return all(torch.equal(epc.parameter, epc.weight_of(epc.latent)) for epc in clusters(net).values())


def agree(one: nn.Module, other: nn.Module, rtol: float = 1e-9) -> bool:
    """Whether two applied networks have the same latents and points."""
    ours, theirs = ({**latents(n), **{f"{k}.p": p for k, p in points(n).items()}} for n in (one, other))
    return all(torch.allclose(ours[key], theirs[key], rtol=rtol, atol=1e-12) for key in theirs)
