"""VGG with batch norm and a single linear layer for CIFAR (Simonyan and Zisserman, arXiv 1409.1556)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.models.base import StagedNet, he_init

CHANNELS = (64, 128, 256, 512, 512)


def _block(cin: int, cout: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convs):
        layers += [
            nn.Conv2d(cin if index == 0 else cout, cout, 3, padding=1),
            nn.BatchNorm2d(cout),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])  # whatever reads the map applies the last ReLU


class VGG(StagedNet):
    """vgg8 (one convolution per block) and vgg13 (two): a block as the stem, four more as stages.

    As published, max pooling precedes the last block only for inputs of 64x64 or more. Pooling rounds odd sizes
    up, so that any input size works: 8x8 ends at one pixel. Map heights for 32x32 input: 16, 8, 4, 4.
    """

    classifier_name = "classifier"

    def __init__(self, convs: int, *, num_classes: int, in_chans: int = 3):
        super().__init__(num_classes, [f"block{i}" for i in (1, 2, 3, 4)], CHANNELS[1:], (2, 4, 8, 8))
        self.block0 = _block(in_chans, CHANNELS[0], convs)
        for i, (cin, cout) in enumerate(pairwise(CHANNELS)):
            setattr(self, f"block{i + 1}", _block(cin, cout, convs))
        self.classifier = nn.Linear(CHANNELS[-1], num_classes)
        he_init(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return self.block0(x)

    def stage(self, index: int, x: Tensor) -> Tensor:
        x = F.relu(x)
        if index < 3 or x.shape[-2] >= 8:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return super().stage(index, x)
