"""A full-precision residual network as users bring it to ``apply(model, binarize=...)``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block as torchvision writes it: one nn.ReLU, used twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=True)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.layer1 = Block(4, 4, 1)
        self.layer2 = Block(4, 6, 2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


BINARIZED = ["layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2"]
both = pytest.mark.parametrize("binarize", ["1/1", "1/32"])


def resnet(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet()


def classes(net: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in net.named_modules() if ".parametrizations" not in name}
