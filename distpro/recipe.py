"""How the weights of a network are trained: optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

SCHEDULES = ("cosine", "step")


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; the learning rate falls along a cosine to 0, or by `decay_rate` after shares of the run.

    `decay_at` is relative: (0.625, 0.75, 0.875) is after epochs 150, 180 and 210 of 240.
    """

    epochs: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    sched: str = "cosine"
    decay_at: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay_rate: float = 0.1

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> SGD:
        return SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> LRScheduler:
        """To be stepped after every batch."""
        steps = max(1, self.epochs * steps_per_epoch)
        if self.sched == "cosine":
            return CosineAnnealingLR(optimizer, steps)
        return MultiStepLR(optimizer, [round(at * steps) for at in self.decay_at], self.decay_rate)
