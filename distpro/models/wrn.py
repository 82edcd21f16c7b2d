"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.errors import UserError
from distpro.models.base import StagedNet, conv, he_init


class WideBlock(nn.Module):
    """A pre-activation block: batch norm, ReLU, 3x3, batch norm, ReLU, 3x3, and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = conv(cin, cout, 3, stride)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = conv(cout, cout)
        self.convShortcut = None if cin == cout else conv(cin, cout, 1, stride)

    def forward(self, x: Tensor, normed: bool = False) -> Tensor:
        """`normed`: x has passed bn1 already; for blocks without an identity shortcut."""
        pre = F.relu(x if normed else self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(pre))))
        return out + (x if self.convShortcut is None else self.convShortcut(pre))


class WideGroup(nn.Module):
    """`count` blocks; only the first changes the shape."""

    def __init__(self, count: int, cin: int, cout: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(WideBlock(cin, cout, stride), *(WideBlock(cout, cout, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor, normed: bool = False) -> Tensor:
        first, *rest = self.layer
        x = first(x, normed)
        for block in rest:
            x = block(x)
        return x


class WideResNet(StagedNet):
    """wrn_D_W: (D - 4) / 6 blocks in each of three stages, W times 16, 32 and 64 channels.

    A stage's map is its residual sum *after* the batch norm that follows: the published pre-activation features.
    That norm belongs to the next stage's first block, or is the network's last. It is run once, at the end of
    the stage, and the next stage starts after it: running it again for the features would update its statistics
    twice per batch. This is exact, because the first block of a later stage changes the number of channels, so
    it has no identity shortcut and only the norm reads the sum.
    Map heights for 32x32 input: 32, 16, 8.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_chans: int = 3):
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise UserError(f"no wrn_{depth}_{width}: the depth is 6n + 4 (10, 16, 22, …), the width 1 or more")
        c1, c2, c3 = 16 * width, 32 * width, 64 * width
        super().__init__(num_classes, ("block1", "block2", "block3"), (c1, c2, c3), (1, 2, 4))
        count = (depth - 4) // 6
        self.conv1 = conv(in_chans, 16)
        self.block1 = WideGroup(count, 16, c1, 1)
        self.block2 = WideGroup(count, c1, c2, 2)
        self.block3 = WideGroup(count, c2, c3, 2)
        self.bn1 = nn.BatchNorm2d(c3)
        self.fc = nn.Linear(c3, num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        group = (self.block1, self.block2, self.block3)[index]
        owner: Any = (self.block2.layer[0], self.block3.layer[0], self)[index]
        return owner.bn1(group(x, normed=index > 0))
