"""Plain knowledge distillation from the logits."""

from __future__ import annotations

from torch import Tensor

from distpro.features import Features, Output, Teacher, same_classes
from distpro.logits import TEMPERATURE, kd
from distpro.methods.base import Method, Moment


class KD(Method):
    """Hinton et al., 2015: 0.1 * CE + distill_loss_weight * T^2 * KL(teacher || student), both softened by T.

    The defaults (0.1, 0.9, T = 4) are those of the CIFAR-100 tables of the field.
    """

    options = ("distill_loss_weight", "temperature")

    def __init__(
        self, student: Features, teacher: Teacher, distill_loss_weight: float = 0.9, temperature: float = TEMPERATURE
    ) -> None:
        super().__init__(student, teacher)
        same_classes(student, teacher, "kd")
        self.task_weight = 0.1
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        assert teacher is not None
        loss = kd(student.logits, teacher.logits, target, self.temperature)
        return {"kd": self.distill_loss_weight * loss}
