"""ShuffleNets for CIFAR: version 1 (Zhang et al., arXiv 1707.01083) and 2 (Ma et al., arXiv 1807.11164)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.models.base import StagedNet, conv

STEM = 24


class GroupedBlock(nn.Module):
    """Version 1's bottleneck; pre-ReLU map in, pre-ReLU map out.

    At stride 2 the average-pooled input is concatenated instead of added. Where the published networks
    differ from the paper (a ReLU after the depthwise convolution), this follows the networks.
    """

    def __init__(self, cin: int, cout: int, stride: int, groups: int):
        super().__init__()
        made = cout - cin if stride == 2 else cout
        mid = made // 4
        self.stride = stride
        self.groups = 1 if cin == STEM else groups
        self.conv1 = conv(cin, mid, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, made, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1)


class ShuffleV1(StagedNet):
    """ShuffleNet 1x with three groups and a 1x1 stem. Map heights for 32x32 input: 16, 8, 4."""

    classifier_name = "linear"

    def __init__(self, *, num_classes: int, in_chans: int = 3):
        channels = (240, 480, 960)
        super().__init__(num_classes, ("layer1", "layer2", "layer3"), channels, (2, 4, 8))
        self.conv1 = conv(in_chans, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        cin = STEM
        for i, (cout, count) in enumerate(zip(channels, (4, 8, 4), strict=True)):
            rest = (GroupedBlock(cout, cout, 1, 3) for _ in range(count - 1))
            setattr(self, f"layer{i + 1}", nn.Sequential(GroupedBlock(cin, cout, 2, 3), *rest))
            cin = cout
        self.linear = nn.Linear(cin, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))


class SplitBlock(nn.Module):
    """Version 2's block at stride 1: half of the channels pass through, the others are convolved.

    Takes and returns maps before the ReLU and the channel shuffle. The half that passes through is already
    non-negative, so that the next block may apply the ReLU to all channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = F.channel_shuffle(F.relu(x), 2).chunk(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        return torch.cat([kept, self.bn3(self.conv3(self.bn2(self.conv2(x))))], 1)


class DownBlock(nn.Module):
    """Version 2's block at stride 2: two parallel convolutional branches; maps as in `SplitBlock`."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        half = cout // 2
        self.groups = 1 if cin == STEM else 2  # the stem's map is not shuffled
        self.conv1 = conv(cin, cin, 3, 2, groups=cin)
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv2 = conv(cin, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(cin, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        x = F.channel_shuffle(F.relu(x), self.groups)
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return torch.cat([left, self.bn5(self.conv5(right))], 1)


class ShuffleV2(StagedNet):
    """ShuffleNetV2 1x with a 1x1 stem; a 1x1 convolution to 1024 channels precedes the pooling.

    Map heights for 32x32 input: 16, 8, 4.
    """

    classifier_name = "linear"

    def __init__(self, *, num_classes: int, in_chans: int = 3):
        channels = (116, 232, 464)
        super().__init__(num_classes, ("layer1", "layer2", "layer3"), channels, (2, 4, 8))
        self.conv1 = conv(in_chans, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        cin = STEM
        for i, (cout, count) in enumerate(zip(channels, (3, 7, 3), strict=True)):
            rest = (SplitBlock(cout) for _ in range(count))
            setattr(self, f"layer{i + 1}", nn.Sequential(DownBlock(cin, cout), *rest))
            cin = cout
        self.conv2 = conv(cin, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x))

    def pool(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.channel_shuffle(F.relu(x), 2)))).mean((2, 3))
