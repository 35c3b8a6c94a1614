"""Hyperbolic binary neural networks as a drop-in, for any model with binary layers.

``hbnn_plugin.apply(model)`` writes each binary weight as the exponential map of a latent weight on a Poincaré ball, at
a point that moves during training (Hyperbolic Binary Neural Network, arXiv 2501.03471). The training loop stays as it
is.
"""

from .diagnostics.clusters import ClusterReport, LayerClusters, cluster_report
from .diagnostics.flips import FlipRatio, flip_ratio
from .export.complexity import Complexity, Cost, LayerComplexity, complexity
from .geometry import ball, sphere
from .geometry.exponential import exp_map, log_map, mobius_add, mobius_scale
from .host.selection import binary_convolutions, by_class, by_name
from .optimizer.cluster_optimizers import ClusterAdam, ClusterAdamW, ClusterSGD
from .optimizer.stepping import step_points
from .retrofit.apply import apply, plan
from .retrofit.checkpoint import plain_state_dict
from .retrofit.fusing import fuse
from .retrofit.planning import Plan
from .version import __version__ as __version__

__all__ = [
    "ClusterAdam",
    "ClusterAdamW",
    "ClusterReport",
    "ClusterSGD",
    "Complexity",
    "Cost",
    "FlipRatio",
    "LayerClusters",
    "LayerComplexity",
    "Plan",
    "apply",
    "ball",
    "binary_convolutions",
    "by_class",
    "by_name",
    "cluster_report",
    "complexity",
    "exp_map",
    "flip_ratio",
    "fuse",
    "log_map",
    "mobius_add",
    "mobius_scale",
    "plain_state_dict",
    "plan",
    "sphere",
    "step_points",
]
