"""Plain knowledge distillation from the logits."""

from __future__ import annotations

from torch import Tensor

from distpro.features import Features, Output, Teacher, same_classes
from distpro.logits import TEMPERATURE, kd
from distpro.methods.base import Method, Moment


class KD(Method):
    """Hinton et al., 2015: task_loss_weight * CE + distill_loss_weight * T^2 * KL(teacher || student), softened by T.

    The defaults (0.1, 0.9, T = 4) are usual on CIFAR-100; on ImageNet 0.5, 0.5 and T = 1 are.
    """

    reads_maps = False
    options = ("task_loss_weight", "distill_loss_weight", "temperature")

    def __init__(
        self,
        student: Features,
        teacher: Teacher,
        task_loss_weight: float = 0.1,
        distill_loss_weight: float = 0.9,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__(student, teacher)
        same_classes(student, teacher, "kd")
        self.task_weight = task_loss_weight
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        assert teacher is not None
        loss = kd(student.logits, teacher.logits, target, self.temperature)
        return {"kd": self.distill_loss_weight * loss}
