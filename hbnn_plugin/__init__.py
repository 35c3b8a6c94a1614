"""Hyperbolic binary neural networks as a drop-in, for any model with binary layers.

``hbnn_plugin.apply(model)`` writes each binary weight as the exponential map of a latent weight on a Poincaré ball, at
a point that moves during training (Hyperbolic Binary Neural Network, arXiv 2501.03471). The training loop stays as it
is.
"""

from . import ball, sphere
from .checkpoint import plain_state_dict
from .counting import Complexity, Cost, LayerComplexity, complexity
from .diagnostics import ClusterReport, LayerClusters, cluster_report
from .epc import exp_map, log_map, mobius_add, mobius_scale
from .flips import FlipRatio, flip_ratio
from .fusing import fuse
from .optim import ClusterAdam, ClusterAdamW, ClusterSGD
from .planning import Plan
from .retrofit import apply, plan
from .selection import binary_convolutions, by_class, by_name
from .stepping import step_points
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
