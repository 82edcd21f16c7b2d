"""MobileNetV2 (Sandler et al., arXiv 1801.04381) at half width, as used for distillation on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from distpro.models.base import StagedNet, conv, he_init

# channels at full width, blocks, stride of the first block
GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
STAGES = ((0, 1), (2,), (3, 4), (5, 6))  # the groups of each stage


def _conv_norm_relu(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout), nn.ReLU()]


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, depthwise 3x3, 1x1 back; plus the input if the shapes agree."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int):
        super().__init__()
        mid = cin * expand
        self.residual = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            *_conv_norm_relu(cin, mid, 1),
            *_conv_norm_relu(mid, mid, 3, stride, groups=mid),
            conv(mid, cout, 1),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(StagedNet):
    """Expansion 6, the last group's map widened to 1280 channels before the pooling.

    No ReLU follows a block, so maps are pre-ReLU anyway. Map heights for 32x32 input: 16, 8, 4, 2.
    """

    classifier_name = "classifier"

    def __init__(self, *, num_classes: int, in_chans: int = 3, width: float = 0.5, expand: int = 6):
        widths = [int(channels * width) for channels, _, _ in GROUPS]
        last = [groups[-1] for groups in STAGES]
        super().__init__(num_classes, [f"blocks.{g}" for g in last], [widths[g] for g in last], (2, 4, 8, 16))
        cin = int(32 * width)
        self.conv1 = nn.Sequential(*_conv_norm_relu(in_chans, cin, 3, stride=2))
        self.blocks = nn.ModuleList()
        for index, (cout, (_, count, stride)) in enumerate(zip(widths, GROUPS, strict=True)):
            factor = 1 if index == 0 else expand
            group = [InvertedResidual(cin, cout, stride, factor)]
            group += [InvertedResidual(cout, cout, 1, factor) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(*group))
            cin = cout
        head = max(1280, int(1280 * width))
        self.conv2 = nn.Sequential(*_conv_norm_relu(cin, head, 1))
        self.classifier = nn.Sequential(nn.Linear(head, num_classes))
        he_init(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        for group in STAGES[index]:
            x = self.blocks[group](x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return self.conv2(x).mean((2, 3))
