"""The interface of a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from distpro.features import Features, Output, Teacher


class Moment(NamedTuple):
    """What a method needs at one moment of the training, known on the host before the step runs.

    weights: the current weights of its losses, on the CPU; `[len(active)]` for pathways. Only they may change between
        replays of one CUDA graph.
    depth: how many stages of the teacher to run; None for the whole network including logits, 0 for none.
    active: the indices of the pathways whose weight is not 0.
    """

    weights: Tensor = torch.ones(0)
    depth: int | None = None
    active: tuple[int, ...] = ()


class Method(nn.Module):
    """The losses that a method adds to the task loss; its parameters, if any, are trained with the student.

    It is constructed from the two networks, whose shapes and stages it may read, and from its `options`. It knows
    neither the data nor the task.
    """

    needs_teacher: ClassVar[bool] = True
    reads_maps: ClassVar[bool] = True  # False: the networks need no stages
    pooled: ClassVar[bool] = False  # read the pooled feature as a last stage; an option "pooled" overrides it
    options: ClassVar[tuple[str, ...]] = ()  # the keyword arguments it accepts
    task_weight: float = 1.0  # weight of the task loss

    def __init__(self, student: Features, teacher: Teacher | None) -> None:
        super().__init__()

    def moment(self, progress: float) -> Moment:
        """What is needed at `progress`, 0 at the first step and 1 at the last; by default the whole teacher."""
        return Moment()

    @property
    def steady(self) -> bool:
        """Whether all moments are alike, so that the caller need not pass the progress of the training."""
        return type(self).moment is Method.moment

    def parts(self) -> Iterable[nn.Module]:
        """The modules it runs one by one, each of which can be compiled on its own."""
        return ()

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        """The weighted loss terms of a batch by name, other than "loss" and "task".

        It must not read any value back to the host.
        moment: its weights are on the device of the batch.
        teacher: None if the moment's depth is 0.
        target: the target of the task loss, usually classes `[N]`.
        """
        raise AssertionError(f"{type(self).__name__} must define forward")
