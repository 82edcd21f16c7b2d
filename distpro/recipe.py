"""How a network is trained: optimizer, learning-rate schedule, label smoothing, weight averaging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from distpro.errors import unknown
from distpro.sgd import SGD

SCHEDULES = ("cosine", "step", "onecycle")
RISE = 0.2  # fraction of a one-cycle schedule


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a learning-rate schedule.

    sched: "cosine" to 0; "step": times `decay_rate` at each of `decay_at`; "onecycle": linearly up for a fifth of the
        run, then linearly to 0.
    decay_at: fractions of the run: (0.625, 0.75, 0.875) is after epochs 150, 180 and 210 of 240.
    norm_decay: apply weight decay to biases and normalisations (parameters of at most one dimension), too.
    label_smoothing: of the task's loss, 0 to 1; a search's validation loss is not smoothed.
    grad_accum_steps: micro-batches per step of a distillation, to save memory; BN sees one at a time.
    max_steps: stop after this many steps, with the learning rates of the whole training.
    ema: decay of an exponential moving average of the student, which is then the result; None keeps the last weights.
    """

    epochs: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    sched: str = "cosine"
    decay_at: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay_rate: float = 0.1
    norm_decay: bool = True
    label_smoothing: float = 0.0
    ema: float | None = None
    grad_accum_steps: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.sched not in SCHEDULES:
            raise unknown("schedule", self.sched, SCHEDULES)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> SGD:
        parameters = list(parameters)
        groups: Any = parameters
        if not self.norm_decay:
            groups = [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ]
        return SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov and self.momentum > 0,
        )

    def scheduler(self, optimizer: Optimizer, steps_per_epoch: int) -> LRScheduler:
        """Return the scheduler, to be stepped after every batch."""
        steps = max(1, self.epochs * steps_per_epoch)
        if self.sched == "cosine":
            return CosineAnnealingLR(optimizer, steps)
        if self.sched == "onecycle":
            # one step more: torch reaches 0 one step before the last, which would then pass below it
            return OneCycleLR(
                optimizer, self.lr, steps + 1, pct_start=RISE, anneal_strategy="linear", cycle_momentum=False
            )
        return MultiStepLR(optimizer, [round(at * steps) for at in self.decay_at], self.decay_rate)
