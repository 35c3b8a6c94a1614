"""Whether a network trained on real images computes the same in every way, on 1,000 test images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import cifar
import hbnn_plugin
from hbnn_plugin.export import to_openvino
from hbnn_plugin.export.agreement import agreement
from hbnn_plugin.export.folding import fold
from latency.networks import Network, trained
from latency.ways import APPLIED, BINARY, FLOAT, FUSED, compile_graph, float_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

__all__ = ["OTHER_KERNELS", "Equality"]

IMAGES, BATCH = 1000, 100

OTHER_KERNELS = "torch, without oneDNN"
"""The measure of what rounding alone does: torch's own other convolution adds in another order."""

APART = 1e-3
"""Of the largest logit: an image whose logits differ by more had an activation next to zero that turned its sign."""


@dataclass(frozen=True)
class Equality:
    """A case."""

    network: Network
    steps: int
    """Of training, see `latency.networks.trained`."""

    @property
    def name(self) -> str:
        return f"{self.network}, {self.steps} steps"

    def measure(self, data: Path, runs: Path) -> dict[str, Any]:
        """Figures; trains the network first unless ``runs`` has it."""
        model = trained(self.network, self.steps, data, runs)
        fused = hbnn_plugin.fuse(copy.deepcopy(model))
        _, test = cifar.load(data, limit=IMAGES)
        batches = list(test.batches(BATCH))
        example = batches[0][0]
        xnor = to_openvino(model, example)
        compiled = compile_graph(float_graph(fold(fused, example)), torch.get_num_threads())
        arms: dict[str, Callable[[Tensor], Tensor]] = {
            APPLIED: model,
            FUSED: fused,
            OTHER_KERNELS: lambda x: _without_onednn(model, x),
            FLOAT: lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()),
            BINARY: xnor,
        }
        with torch.inference_mode():
            outputs = {name: torch.cat([arm(x) for x, _ in batches]) for name, arm in arms.items()}
        expected, labels = outputs[APPLIED], torch.cat([labels for _, labels in batches])
        return {
            "images": len(labels),
            "accuracy": {name: float((out.argmax(1) == labels).float().mean()) for name, out in outputs.items()},
            "agreement": {name: agreement(out, expected)._asdict() for name, out in outputs.items()},
            "images apart": {
                name: int(((out - expected).abs().amax(1) > APART * expected.abs().max()).sum())
                for name, out in outputs.items()
            },
            "binary layers": [layer.name for layer in xnor.layers if layer.binary],
            "float layers": xnor.notes,
        }


def _without_onednn(model: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        out: Tensor = model(x)
    return out
