"""The networks of the binary literature, for any host's convolution.

Full precision stay the first convolution, the last linear layer and the 1 × 1 downsampling. Every binary convolution of
a residual network has a shortcut of its own (Bi-Real Net, arXiv:1808.00278; so do the public IR-Net networks):
x ← hardtanh(BatchNorm(conv(x)) + shortcut(x)). Before the last layer comes a BatchNorm of the pooled features. The same
holds for ImageNet (the public networks of IR-Net and ReCU), where only the stem differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from hosts.common import BinaryConv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hosts.common import BinaryConvClass

__all__ = [
    "NETWORKS",
    "ResNet",
    "VggSmall",
    "resnet8",
    "resnet18",
    "resnet18_imagenet",
    "resnet20",
    "resnet34_imagenet",
    "vgg_small",
]


WIDE = (64, 128, 256, 512)


class _PadShortcut(nn.Module):
    """Option A of the ResNet paper: take every other pixel, fill the new channels with zeros on both sides."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class _Block(nn.Module):
    """Two binary convolutions, each with its own shortcut."""

    def __init__(self, conv: BinaryConvClass, width_in: int, width: int, stride: int, downsample: bool) -> None:
        super().__init__()
        self.conv1 = conv(width_in, width, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=1, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and downsample:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )
        elif stride != 1:
            self.shortcut = _PadShortcut(width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.bn1(self.conv1(x)) + self.shortcut(x))
        return F.hardtanh(self.bn2(self.conv2(x)) + x)


class ResNet(nn.Module):
    """A stem, then stages of ``blocks[i]`` blocks of ``widths[i]`` channels; all but the first halve the image.

    The stem is a 3 × 3 convolution, or for ImageNet one of 7 × 7 and a max pooling, each of which halves the image too.
    """

    def __init__(
        self,
        conv: BinaryConvClass,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        downsample: bool,
        imagenet: bool = False,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()
        width_in = widths[0]
        stages = []
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for j in range(count):
                stage.append(_Block(conv, width_in, width, 2 if i and not j else 1, downsample))
                width_in = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.bn2 = nn.BatchNorm1d(width_in)
        self.linear = nn.Linear(width_in, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(F.hardtanh(self.bn1(self.conv1(x)))))
        out: Tensor = self.linear(self.bn2(x.mean((2, 3))))
        return out


class VggSmall(nn.Module):
    """128-128-256-256-512-512, halved by pooling after every second convolution; the first one is full precision."""

    def __init__(self, conv: BinaryConvClass, num_classes: int, in_channels: int) -> None:
        super().__init__()
        widths = (128, 128, 256, 256, 512, 512)
        layers: list[nn.Module] = []
        width_in = in_channels
        for i, width in enumerate(widths):
            layer = conv(width_in, width, 3, padding=1) if i else nn.Conv2d(width_in, width, 3, padding=1, bias=False)
            pool = [nn.MaxPool2d(2)] if i % 2 else []
            layers += [layer, *pool, nn.BatchNorm2d(width), nn.Hardtanh()]
            width_in = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(512 * 4 * 4, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.features(x).flatten(1))
        return out


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, BinaryConv):
            module.weight_drawn()


def resnet8(conv: BinaryConvClass, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> ResNet:
    """One block a stage, for small studies; parameter-free shortcuts."""
    return ResNet(conv, (1, 1, 1), (width, 2 * width, 4 * width), num_classes, in_channels, downsample=False)


def resnet20(conv: BinaryConvClass, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """16-32-64 channels, three blocks a stage; parameter-free shortcuts."""
    return ResNet(conv, (3, 3, 3), (16, 32, 64), num_classes, in_channels, downsample=False)


def resnet18(conv: BinaryConvClass, num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """64-128-256-512 channels, two blocks a stage; full-precision 1 × 1 downsampling, no pooling after the stem."""
    return ResNet(conv, (2, 2, 2, 2), WIDE, num_classes, in_channels, downsample=True)


def resnet18_imagenet(conv: BinaryConvClass, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """As `resnet18`, behind the stem for 224 × 224 images."""
    return ResNet(conv, (2, 2, 2, 2), WIDE, num_classes, in_channels, downsample=True, imagenet=True)


def resnet34_imagenet(conv: BinaryConvClass, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """Three, four, six and three blocks of the same widths."""
    return ResNet(conv, (3, 4, 6, 3), WIDE, num_classes, in_channels, downsample=True, imagenet=True)


def vgg_small(conv: BinaryConvClass, num_classes: int = 10, in_channels: int = 3) -> VggSmall:
    """For 32 × 32 images only: its last layer sees 4 × 4 pixels."""
    return VggSmall(conv, num_classes, in_channels)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet18_imagenet": resnet18_imagenet,
    "resnet20": resnet20,
    "resnet34_imagenet": resnet34_imagenet,
    "vgg_small": vgg_small,
}
