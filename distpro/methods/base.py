"""The interface of a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from distpro.features import Features, Output, Teacher


class Moment(NamedTuple):
    """What a method needs at a moment of the training, known on the host before the step runs.

    weights: what its losses count now, on the CPU; the only part that may differ from step to step within one
        CUDA graph. `[len(active)]` for pathways.
    depth: how many stages of the teacher are to run: None for the whole network, logits too, 0 for nothing.
    active: the pathways that count, by index.
    """

    weights: Tensor = torch.ones(0)
    depth: int | None = None
    active: tuple[int, ...] = ()


class Method(nn.Module):
    """The losses that a method adds to the task's; its parameters, if any, train along with the student.

    It is made from the two networks, of which it may read shapes and stages, and from the options it lists. It
    knows neither data nor task.
    """

    needs_teacher: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = True  # else networks without stages will do
    pooled: ClassVar[bool] = False  # read the pooled feature as a last stage; an option "pooled" overrides it
    options: ClassVar[tuple[str, ...]] = ()  # the keyword arguments it understands
    task_weight: float = 1.0  # what the task's own loss counts beside the method's

    def __init__(self, student: Features, teacher: Teacher | None) -> None:
        super().__init__()

    def moment(self, progress: float) -> Moment:
        """What is needed at this moment, 0 at the first step and 1 at the last; by default the whole teacher."""
        return Moment()

    @property
    def steady(self) -> bool:
        """Whether every moment is like the others, so that nobody has to say where the training stands."""
        return type(self).moment is Method.moment

    def parts(self) -> Iterable[nn.Module]:
        """The modules it runs one by one, each of which can be compiled; no graph then holds more than one."""
        return ()

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        """The weighted loss terms of a batch by name, any but "loss" and "task".

        moment: with its weights on the device of the batch. Nothing here may read a value back to the host.
        teacher: None where the moment's depth is 0.
        target: what the task's loss compares with, classes `[N]` as a rule.
        """
        raise AssertionError(f"{type(self).__name__} must define forward")
