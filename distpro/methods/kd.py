"""Plain knowledge distillation from the logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distpro.errors import UserError
from distpro.features import Features, Output, Teacher
from distpro.methods.base import Method, Moment


class KD(Method):
    """Hinton et al., 2015: 0.1 * CE + distill_loss_weight * T^2 * KL(teacher || student), both softened by T.

    The defaults (0.1, 0.9, T = 4) are those of the CIFAR-100 tables of the field.
    """

    options = ("distill_loss_weight", "temperature")

    def __init__(
        self, student: Features, teacher: Teacher, distill_loss_weight: float = 0.9, temperature: float = 4.0
    ) -> None:
        super().__init__(student, teacher)
        if student.classes != teacher.classes:
            raise UserError(
                f"kd compares logits: the teacher has {teacher.classes} classes, the student {student.classes}"
            )
        self.task_weight = 0.1
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature

    def forward(self, student: Output, teacher: Output | None, moment: Moment) -> dict[str, Tensor]:
        assert teacher is not None
        soft = F.log_softmax(student.logits / self.temperature, 1)
        target = F.log_softmax(teacher.logits / self.temperature, 1)
        divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        return {"kd": self.distill_loss_weight * self.temperature**2 * divergence}
