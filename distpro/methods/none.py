"""No distillation: the student alone."""

from __future__ import annotations

from torch import Tensor

from distpro.features import Output
from distpro.methods.base import Method, Moment


class NoDistillation(Method):
    """Adds nothing; the teacher never runs."""

    needs_teacher = False
    reads_maps = False

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        return {}
