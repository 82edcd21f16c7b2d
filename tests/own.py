"""A small pair of networks, a batch and a network of a user's own, for the tests of loops of one's own."""

import torch
from torch import nn

from distpro.models import create_model

IMAGE = (3, 16, 16)


def networks():
    torch.manual_seed(0)
    return create_model("wrn_10_1", 10), create_model("resnet8", 10)


def batch(size=4):
    torch.manual_seed(1)
    return torch.randn(size, *IMAGE), torch.randint(10, (size,))


class Plain(nn.Module):
    """A convolution, a ReLU in place or not, and a classifier."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace), nn.Linear(6, 10)
        self.extra = nn.Conv2d(6, 6, 1)
        self.skip = False

    def forward(self, x):
        x = self.relu(self.conv(x))
        if not self.skip:
            x = x + self.extra(x)
        return self.fc(x.mean((2, 3)))
