"""Phase 2, and every baseline: train a student with a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from distpro.distiller import Distiller
from distpro.loop import Observer, fit
from distpro.process import Process
from distpro.recipe import Recipe


class DistillStep:
    """One step of the student, and of the method's own blocks, down the gradient of the distiller's loss."""

    def __init__(self, distiller: Distiller, recipe: Recipe) -> None:
        self.distiller = distiller
        self.optimizer = recipe.optimizer(distiller.trainable_parameters())

    def __call__(self, x: Tensor, y: Tensor, progress: float) -> dict[str, Tensor]:
        losses = self.distiller(x, y, progress)
        self.optimizer.zero_grad(set_to_none=True)
        with record_function("backward"):
            losses["loss"].backward()
        with record_function("optimizer"):
            self.optimizer.step()
        return losses

    def state_dict(self) -> dict[str, Any]:
        """The teacher is an input, not a result: it is left out."""
        return {
            "student": self.distiller.student.model.state_dict(),
            "method": self.distiller.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.distiller.student.model.load_state_dict(state["student"])
        self.distiller.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Any,
    recipe: Recipe,
    *,
    process: Process | None = None,
    method: str = "distpro",
    test: Any = None,
    image: Sequence[int] | None = None,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    name: str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train `student` in place and return its history, one row an epoch (losses, lr, seconds, test accuracy).

    train, test: iterables of `(x [N, C, H, W], y [N])` with a length; test accuracy is measured after every epoch
        and chooses nothing.
    options: the method's own (kd_weight, transforms, ...).
    """
    image = tuple(image or next(iter(train))[0].shape[1:])
    distiller = Distiller(
        student,
        teacher,
        image=(image[0], image[1], image[2]),
        method=method,
        process=process,
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        **options,
    ).train()
    step = DistillStep(distiller, recipe)

    def evaluate() -> dict[str, float]:
        metrics = distiller.task.evaluate(distiller.student, test)
        return {f"test_{k}": v for k, v in metrics._asdict().items()}

    return fit(
        step,
        train,
        recipe.scheduler(step.optimizer, len(train)),
        recipe.epochs,
        name=name or method,
        evaluate=evaluate if test is not None else None,
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
    )
