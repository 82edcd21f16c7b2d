"""Students whose maps are read as ReviewKD's CIFAR code reads them: configs/reviewkd-reading.yaml.

That code reads teachers before the ReLU, but students at the output of their blocks: after the ReLU in a ResNet, before
the BN in a WRN. `distpro` reads students as it reads teachers.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.models.resnet import ResNet
from distpro.models.wrn import WideResNet


class BehindReLU(ResNet):
    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
        final, maps = super().forward_intermediates(x, *args, **options)
        return final, [F.relu(m) for m in maps]


class BeforeBN(WideResNet):
    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
        sums: list[Tensor] = []
        norms: list[nn.Module] = [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]
        hooks = [norm.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0])) for norm in norms]
        try:
            final, _ = super().forward_intermediates(x, *args, **options)
        finally:
            for hook in hooks:
                hook.remove()
        return final, sums


def resnet20(num_classes: int, in_chans: int) -> nn.Module:
    return BehindReLU(20, (16, 16, 32, 64), num_classes=num_classes, in_chans=in_chans)


def wrn_16_1(num_classes: int, in_chans: int) -> nn.Module:
    return BeforeBN(16, 1, num_classes=num_classes, in_chans=in_chans)
