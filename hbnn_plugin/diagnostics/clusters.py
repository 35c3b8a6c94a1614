"""Where the points of a model are, and what they do to its binary weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..cluster.epc import applied_layers
from ..cluster.reference import current_bits
from .tables import ByLayer, table

__all__ = ["ClusterReport", "LayerClusters", "cluster_report"]


class LayerClusters(NamedTuple):
    """One layer's points.

    Attributes:
        points: how many.
        steps: how many steps they have made.
        mean_reach: mean of √r‖p‖ over them: 0 at the ball's origin, 1 at its edge (1 everywhere on the sphere).
        reach: its maximum.
        disagreement: share of weights whose binary value differs from the one the host would give the latent weight
            itself. Meaningful only while the latent is close to the weight, as with points that start at the origin.
    """

    points: int
    steps: int
    mean_reach: float
    reach: float
    disagreement: float


class ClusterReport(ByLayer[LayerClusters]):
    """Layer name → :class:`LayerClusters`. Its repr is a table."""

    def __repr__(self) -> str:
        rows = [
            (
                name,
                str(x.points),
                str(x.steps),
                f"{x.mean_reach:.4f}",
                f"{x.reach:.4f}",
                f"{100 * x.disagreement:.2f} %",
            )
            for name, x in self.items()
        ]
        header = ("layer", "points", "steps", "mean √r‖p‖", "max √r‖p‖", "binary weight ≠ latent's")
        return table("exponential parametrization clusters", header, rows)


def cluster_report(model: nn.Module) -> ClusterReport:
    """How far each layer's points have moved, as a share of the ball's radius, and how many binary weights they decide.

    Raises:
        ValueError: the model was never applied, or is fused.
    """
    layers: dict[str, LayerClusters] = {}
    for name, (module, tensor_name, epc) in applied_layers(model).items():
        bits = current_bits(module, tensor_name, epc)
        with epc.bypassed():
            latent_bits = current_bits(module, tensor_name, epc)
        reach = epc.reach()
        layers[name] = LayerClusters(
            points=epc.point_count,
            steps=int(epc.steps),
            mean_reach=float(reach.mean()),
            reach=float(reach.max()),
            disagreement=float((bits != latent_bits).float().mean()),
        )
    return ClusterReport(layers)
