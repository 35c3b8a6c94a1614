"""The ImageNet networks have the sizes of the full-precision ones that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hosts import HOSTS, binary_layers
from hosts.networks import NETWORKS

FLOATS = 694_440
"""First convolution, the three of 1 × 1, last layer with its bias."""


@pytest.mark.parametrize(
    ("arch", "binary", "convs", "total"),
    [("resnet18_imagenet", 10_985_472, 16, 11_689_512), ("resnet34_imagenet", 21_086_208, 32, 21_797_672)],
)
def test_imagenet_networks_have_the_usual_parameters(arch: str, binary: int, convs: int, total: int) -> None:
    model = NETWORKS[arch](HOSTS["irnet"].conv)
    layers = [layer for _, layer in binary_layers(model)]
    assert (len(layers), sum(layer.weight.numel() for layer in layers)) == (convs, binary)
    plain = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert sum(p.numel() for m in plain for p in m.parameters()) == FLOATS
    # torchvision's counts; only the BatchNorm of the pooled features is not in them
    assert sum(p.numel() for p in model.parameters()) - 2 * 512 == total


def test_every_binary_convolution_has_a_shortcut_and_the_stem_leaves_a_quarter() -> None:
    model = NETWORKS["resnet18_imagenet"](HOSTS["irnet"].conv, num_classes=10)
    for name, module in model.named_modules():
        if name.endswith(("bn1", "bn2")) and name.startswith("stages"):
            nn.init.zeros_(module.weight)  # shuts the binary convolutions, shortcuts stay open
    seen: list[torch.Size] = []
    model.stages.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model.eval()
    first, second = model(torch.randn(2, 3, 64, 64)).detach()
    assert (seen, first.shape) == ([(2, 64, 16, 16)], (10,))
    assert not torch.allclose(first, second)
