"""The map alone, forward and backward to the latent, on the weights of real networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import geoopt
import torch
from torch import Tensor

import hbnn_plugin
from hbnn_plugin import ball
from hbnn_plugin.geometry.exponential import exp_map_mapped
from hbnn_plugin.geometry.joint_maps import Map, exp_maps
from hosts import binary_layers, get_host
from hosts.networks import NETWORKS
from measuring import in_turns, median, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FLOOR", "measure_map", "one_layer", "weights_of"]

RADIUS = 0.05
FLOOR = "memory floor"
MOVED = 7
"""Weight-sized tensors that have to move: p and v read and x written, then p, v and ∂L/∂x read and ∂L/∂v written."""


class Weights(NamedTuple):
    """One layer's, of shape (filters, coordinates)."""

    point: Tensor
    latent: Tensor
    upstream: Tensor
    dims: tuple[int, ...]
    """Of one point: (1,) for a point per filter, (0, 1) for one in all."""


def _weights(filters: int, coordinates: int, per: str, generator: torch.Generator) -> Weights:
    dims = (1,) if per == "filter" else (0, 1)
    v = 0.02 * torch.randn(filters, coordinates, generator=generator)
    p = torch.randn(filters, coordinates, generator=generator)
    p *= 0.2 / (RADIUS**0.5 * p.norm(dim=dims, keepdim=True))  # a fifth of the way to the edge
    return Weights(p, v.requires_grad_(), torch.randn(filters, coordinates, generator=generator), dims)


def one_layer(points: int, weights: int) -> list[Weights]:
    """The largest layer of a ResNet, in so many points."""
    generator = torch.Generator().manual_seed(0)
    if points == 1:
        return [_weights(512, weights // 512, "layer", generator)]
    return [_weights(points, weights // points, "filter", generator)]


def weights_of(arch: str, per: str) -> list[Weights]:
    """All binary layers of a network."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = NETWORKS[arch](get_host("irnet", arch).conv)
    shapes = [layer.weight.flatten(1).shape for _, layer in binary_layers(network)]
    return [_weights(n, k, per, generator) for n, k in shapes]


def _geoopt(ball: geoopt.PoincareBallExact, w: Weights) -> Tensor:
    rows = (1, -1) if len(w.dims) == 2 else w.latent.shape
    return ball.expmap(w.point.view(rows), w.latent.view(rows)).view(w.latent.shape)  # type: ignore[no-any-return]


def _formula(p: Tensor, v: Tensor, dims: tuple[int, ...]) -> Tensor:
    """exp_p(v) as the paper writes it, in torch's operations."""
    vv, pp = (v * v).sum(dims, keepdim=True), (p * p).sum(dims, keepdim=True)
    norm = (RADIUS * vv).sqrt()
    u = (norm / (1 - RADIUS * pp)).tanh() / norm * v
    pu, uu = (p * u).sum(dims, keepdim=True), (u * u).sum(dims, keepdim=True)
    above = (1 + 2 * RADIUS * pu + RADIUS * uu) * p + (1 - RADIUS * pp) * u
    return above / (1 + 2 * RADIUS * pu + RADIUS**2 * pp * uu)


def measure_map(layers: Sequence[Weights], turns: int, compiled: bool = True) -> dict[str, Any]:
    """Milliseconds of each way to compute the map of all layers forward and backward, and ratios to ours."""
    theirs = geoopt.PoincareBallExact(c=RADIUS)

    def both_ways(exp: Callable[[], Sequence[Tensor]]) -> Callable[[], object]:
        latents, upstreams = [w.latent for w in layers], [w.upstream for w in layers]
        return lambda: torch.autograd.grad(exp(), latents, upstreams)

    def each(exp: Callable[[Weights], Tensor]) -> Callable[[], Sequence[Tensor]]:
        return lambda: [exp(w) for w in layers]

    def plugin() -> Sequence[Tensor]:
        """As in a model's forward: all layers together."""
        maps = [Map(w.point, w.latent, RADIUS, ball, w.dims) for w in layers]
        return [exp_map_mapped(*pair) for pair in zip(maps, exp_maps(maps), strict=True)]

    def floor() -> None:
        for w in layers:  # two fresh tensors at a time, as a map's result and its gradient are
            kept = w.point.clone(), w.latent.detach().clone()
            del kept

    arms: dict[str, Callable[[], object]] = {
        "plugin": both_ways(plugin),
        "geoopt": both_ways(each(lambda w: _geoopt(theirs, w))),
        FLOOR: floor,
    }
    if compiled:
        torch.compiler.reset()
        ours, plain = torch.compile(hbnn_plugin.exp_map), torch.compile(_formula)
        arms["plugin, compiled"] = both_ways(each(lambda w: ours(w.point, w.latent, RADIUS, dims=w.dims)))
        arms["formula, compiled"] = both_ways(each(lambda w: plain(w.point, w.latent, w.dims)))
    seconds = in_turns(arms, turns)
    seconds[FLOOR] = [s * MOVED / 4 for s in seconds[FLOOR]]  # the clones move four
    return {
        "milliseconds": {arm: median([1e3 * s for s in times]).as_dict for arm, times in seconds.items()},
        "geoopt / plugin": ratio(seconds["geoopt"], seconds["plugin"]).as_dict,
        "ratio to the floor": {
            arm: ratio(times, seconds[FLOOR]).as_dict for arm, times in seconds.items() if arm != FLOOR
        },
    }
