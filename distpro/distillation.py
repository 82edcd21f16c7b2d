"""Phase 2, and every baseline: train a student with a method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from distpro import parallel
from distpro.distiller import Distiller
from distpro.loop import Observer, fit, image_shape
from distpro.methods import Method, Moment
from distpro.planned_step import Plan, PlannedStep, graphed
from distpro.process import Process
from distpro.recipe import Recipe
from distpro.tasks import after_epochs


class EMA(nn.Module):
    """An exponential moving average of a network's weights and buffers: decay * average + (1 - decay) * network.

    The first step copies. Unlike timm's ModelEmaV3 it updates each tensor once, however many names it has, and unlike
    torch's AveragedModel it never synchronises with a GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        ours, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - self.decay if self.steps else 1.0)
        for a, b in zip(ours, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


class DistillStep(PlannedStep):
    """One optimizer step of the student and of the method's own blocks on the distiller's loss."""

    def __init__(self, distiller: Distiller, recipe: Recipe) -> None:
        self.distiller, self.parts = distiller, recipe.grad_accum_steps
        self.moving = distiller.trainable_parameters()
        self.optimizer = recipe.optimizer(self.moving)
        self.average = None if recipe.ema is None else EMA(distiller.student.model, recipe.ema)

    def plan(self, progress: float) -> Plan:
        """Return the current weights; each set of pathways and each depth of the teacher has its own graph."""
        weights, *what = self.distiller.method.moment(progress)
        return Plan(tuple(what), weights.double())

    def take(self, x: Tensor, y: Tensor, plan: Plan) -> dict[str, Tensor]:
        moment = Moment(plan.numbers.float(), *plan.key)
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        parts = min(self.parts, len(x))  # a last batch may be smaller
        for part, labels in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            terms = self.distiller.losses(part, labels, moment)
            if parts > 1:
                terms = {name: value * (len(part) / len(x)) for name, value in terms.items()}
            with record_function("backward"):
                terms["loss"].backward()
            losses = {name: losses[name] + value.detach() if losses else value for name, value in terms.items()}
        parallel.all_reduce_mean(parameter.grad for parameter in self.moving)
        with record_function("optimizer"):
            self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def after(self) -> None:
        if self.average is not None:
            self.average.update(self.distiller.student.model)

    def sync_ranks(self) -> None:
        averages = [] if self.average is None else [self.average]
        parallel.sync_ranks([self.distiller.student.model, self.distiller.method, *averages])

    def state_dict(self) -> dict[str, Any]:
        """Leave out the teacher, which is an input, not a result."""
        state: dict[str, Any] = {
            "student": self.distiller.student.model.state_dict(),
            "method": self.distiller.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.distiller.student.model.load_state_dict(state["student"])
        self.distiller.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def result(self) -> nn.Module:
        """Return the network to evaluate and keep."""
        return self.distiller.student.model if self.average is None else self.average.module


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Any,
    recipe: Recipe,
    *,
    process: Process | None = None,
    method: str | type[Method] = "distpro",
    test: Any = None,
    image: Sequence[int] | None = None,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    name: str | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    cuda_graphs: bool | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train `student` in place and return its history, one row per epoch (losses, lr, seconds, test accuracy).

    train, test: iterables of `(x [N, C, H, W], y [N])` with a length; test accuracy is measured after every epoch
        and selects nothing.
    options: of `Distiller` and of the method (precision, task, kd_weight, transforms, ...).
    """
    distiller = Distiller(
        student,
        teacher,
        image=image_shape(train, image),
        method=method,
        process=process,
        student_layers=student_layers,
        teacher_layers=teacher_layers,
        **{"label_smoothing": recipe.label_smoothing} | options,
    )
    return run(
        distiller,
        train,
        recipe,
        test=test,
        name=name or (method if isinstance(method, str) else method.__name__),
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
        cuda_graphs=cuda_graphs,
        task=options.get("task"),
    )


def run(
    distiller: Distiller,
    train: Any,
    recipe: Recipe,
    *,
    name: str,
    test: Any = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    cuda_graphs: bool | None = None,
    task: Any = None,
) -> list[dict[str, float]]:
    """Train a distiller in place and return its history; see `distill`. `task`: the distiller's, if it is custom."""
    student = distiller.student.model
    step = DistillStep(distiller.train(), recipe)
    history = fit(
        graphed(step, next(student.parameters()).device, observer or Observer(), cuda_graphs),
        train,
        recipe.scheduler(step.optimizer, len(train)),
        recipe.epochs,
        name=name,
        evaluate=after_epochs(step.result, test, task),
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
        max_steps=recipe.max_steps,
    )
    if step.average is not None:
        student.load_state_dict(step.result().state_dict())
    return history
