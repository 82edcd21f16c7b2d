"""CIFAR residual networks (He et al., arXiv 1512.03385): basic blocks in three stages; ResNet-50 has four."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.errors import UserError
from distpro.models.base import StagedNet, conv, he_init, projection


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; pre-ReLU map in, pre-ReLU map out."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = conv(cin, cout, 3, stride)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = conv(cout, cout)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = projection(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.downsample(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; pre-ReLU map in, pre-ReLU map out."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        mid = cout // 4
        self.conv1 = conv(cin, mid, 1)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, cout, 1)
        self.bn3 = nn.BatchNorm2d(cout)
        self.shortcut = projection(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut(x)


def _layer(block: Callable[[int, int, int], nn.Module], count: int, cin: int, cout: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(cin, cout, stride), *(block(cout, cout, 1) for _ in range(count - 1)))


class ResNet(StagedNet):
    """resnet8 to resnet110, and the wider resnet8x4 and resnet32x4. Map heights for 32x32 input: 32, 16, 8.

    `channels`: of the stem and of the three stages.
    """

    def __init__(self, depth: int, channels: tuple[int, int, int, int], *, num_classes: int, in_chans: int = 3):
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"the depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, …), not {depth}")
        super().__init__(num_classes, ("layer1", "layer2", "layer3"), channels[1:], (1, 2, 4))
        stem, c1, c2, c3 = channels
        count = (depth - 2) // 6
        self.conv1 = conv(in_chans, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _layer(BasicBlock, count, stem, c1, 1)
        self.layer2 = _layer(BasicBlock, count, c1, c2, 2)
        self.layer3 = _layer(BasicBlock, count, c2, c3, 2)
        self.fc = nn.Linear(c3, num_classes)
        he_init(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class ResNet50(StagedNet):
    """ResNet-50 with a 3x3 stem at stride 1 and no max pooling. Map heights for 32x32 input: 32, 16, 8, 4."""

    classifier_name = "linear"

    def __init__(self, *, num_classes: int, in_chans: int = 3):
        layers = ("layer1", "layer2", "layer3", "layer4")
        super().__init__(num_classes, layers, (256, 512, 1024, 2048), (1, 2, 4, 8))
        self.conv1 = conv(in_chans, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _layer(Bottleneck, 3, 64, 256, 1)
        self.layer2 = _layer(Bottleneck, 4, 256, 512, 2)
        self.layer3 = _layer(Bottleneck, 6, 512, 1024, 2)
        self.layer4 = _layer(Bottleneck, 3, 1024, 2048, 2)
        self.linear = nn.Linear(2048, num_classes)
        he_init(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))
