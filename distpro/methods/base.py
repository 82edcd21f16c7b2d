"""The interface of a method."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from distpro.features import Features, Output, Teacher


class Method(nn.Module):
    """The losses that a method adds to the task's; its parameters, if any, train along with the student.

    It is made from the two networks, of which it may read shapes and stages, and from the options it lists. It
    knows neither data nor task.
    """

    needs_teacher: ClassVar[bool] = True
    pooled: ClassVar[bool] = False  # read the pooled feature as a last stage; an option "pooled" overrides it
    options: ClassVar[tuple[str, ...]] = ()  # the keyword arguments it understands
    task_weight: float = 1.0  # what the task's own loss counts beside the method's

    def __init__(self, student: Features, teacher: Teacher | None) -> None:
        super().__init__()

    def wants_teacher(self, progress: float) -> bool:
        """Whether the teacher must run at this moment of the training (0 first step, 1 last)."""
        return self.needs_teacher

    def forward(self, student: Output, teacher: Output | None, progress: float) -> dict[str, Tensor]:
        """The weighted loss terms of a batch by name; `teacher` is None where it was not wanted."""
        raise AssertionError(f"{type(self).__name__} must define forward")
