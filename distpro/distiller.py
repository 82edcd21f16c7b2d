"""A student, its teacher and a method as one module, for the loops here or your own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from distpro import parallel
from distpro.errors import UserError, unknown
from distpro.features import Features, Teacher
from distpro.methods import METHODS, Method, Moment
from distpro.precision import PLAIN, Precision, to_device
from distpro.process import Process
from distpro.tasks import Classification
from distpro.transforms import Shape


class Distiller(nn.Module):
    """`distiller(x, y)` returns the losses of a batch: {"loss": total, "task": ..., and the method's terms}.

    student, teacher: any networks (see `Features`); the teacher stays in eval mode and gets no gradients.
    image: the shape `[C, H, W]` of one image.
    method: a name in `METHODS`, or a subclass of `Method`; its options follow as keywords (kd_weight, transforms, ...).
    process: for "distpro"; a `Process`, or None for uniform weights.
    student_layers, teacher_layers: submodules to read, for networks without `forward_intermediates`.
    precision: see `Precision`; plain float32 by default.
    sync_bn: synchronise BN of the student and of the method's blocks over all ranks (see `distpro.parallel`).
    task: the task's loss of logits `[N, K]` and targets, without parameters; by default the cross-entropy with classes
        `[N]` or probabilities `[N, K]`, with `label_smoothing`.
    compile: apply `torch.compile` to the student and each block of the method; state-dict keys do not change.
    steps: the number of training calls. Calls in train mode are counted, and the progress of the training determines
        the weights. Alternatively pass it to each call: `distiller(x, y, progress=0.25)`. One of the two is required
        if the method's losses ramp up (`warm_up`) or its process varies.

    Optimise `distiller.trainable_parameters()`, those of the student and of the method's blocks, and save
    `student.state_dict()`, whose keys do not change. With several processes, wrap it as
    `DistributedDataParallel(distiller, find_unused_parameters=True)`, since a dropped pathway has no gradient.

    Equivalent to:
        loss = task_weight * task(student(x), y) + sum(method(student maps, teacher maps, progress))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        image: Shape,
        method: str | type[Method] = "distpro",
        process: Process | None = None,
        student_layers: Sequence[str] | None = None,
        teacher_layers: Sequence[str] | None = None,
        steps: int | None = None,
        precision: Precision = PLAIN,
        task: Callable[[Tensor, Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
        sync_bn: bool = False,
        compile: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(method, str):
            if method not in METHODS:
                raise unknown("method", method, METHODS)
            kind = METHODS[method]
        elif isinstance(method, type) and issubclass(method, Method):
            kind, method = method, method.__name__
        else:
            raise UserError(f"method {method!r}: expected a name ({', '.join(METHODS)}) or a subclass of Method")
        if task is not None and label_smoothing:
            raise UserError("label_smoothing only applies to the default cross-entropy, not to a custom task")
        if isinstance(task, nn.Module) and [*task.parameters()]:
            raise UserError(f"{type(task).__name__} has parameters, which would not be trained: use a Method instead")
        if process is not None:
            if not isinstance(process, Process):
                raise UserError(
                    f"process {process!r}: expected a Process, such as Process.load(FILE), or None for uniform"
                )
            options["process"] = process
        for name in options:
            if name not in kind.options:
                raise unknown(f"option of method {method}", name, kind.options)
        if kind.needs_teacher and teacher is None:
            raise UserError(f"method {method} needs a teacher")
        pooled = options.get("pooled", kind.pooled)
        self.student = Features(student, image, student_layers, pooled, kind.reads_maps)
        self.teacher = None
        if teacher is not None and kind.needs_teacher:
            if any(p.requires_grad for p in {*student.parameters()} & {*teacher.parameters()}):
                raise UserError("teacher and student share trainable parameters: copy.deepcopy one of them")
            self.teacher = Teacher(teacher, image, teacher_layers, pooled, precision, kind.reads_maps)
            kept = [*self.teacher.named_parameters(), *self.teacher.named_buffers()]
            self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name, _ in kept]  # read by DDP
        for reader in (self.student, self.teacher) if kind.reads_maps else ():
            if reader is not None:
                reader.need_stages()
        parameter = next(student.parameters())
        self.method = kind(self.student, self.teacher, **options).to(parameter.device, parameter.dtype)
        self.precision = precision
        for part in (self.student, self.method):
            precision.lay_out(part)
            if sync_bn:
                parallel.convert_sync_batchnorm(part)
        for module in (self.student, *self.method.parts()) if compile else ():
            module.compile()
        self.task = Classification(label_smoothing).loss if task is None else task
        self.smoothed = label_smoothing > 0
        self.steps = steps
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor, progress: float | None = None) -> dict[str, Tensor]:
        if progress is None:
            progress = self._progress()
        elif not -1e-6 <= progress <= 1 + 1e-6:  # sums of fractions have rounding errors
            raise UserError(f"progress {progress}: expected 0 (the first step of the training) to 1 (its last)")
        return self.losses(x, y, self.method.moment(progress))

    def losses(self, x: Tensor, y: Tensor, moment: Moment) -> dict[str, Tensor]:
        """Return the losses at a given `moment`, whose weights may already be on the device."""
        moment = moment._replace(weights=to_device(moment.weights, x.device))
        x = self.precision.layout(x)
        with self.precision.autocast(x.device):
            with record_function("teacher"):
                taught = self.teacher.ahead(x, moment.depth) if self.teacher is not None and moment.depth != 0 else None
            with record_function("student"):
                output = self.student(x)
            with record_function("losses"):
                terms = self.method(output, taught and taught(), y, moment)
                task = self.task(output.logits, y)
        if "loss" in terms or "task" in terms:
            raise UserError(f"{type(self.method).__name__} returns a term named 'loss' or 'task', which are reserved")
        return {"loss": sum(terms.values(), self.method.task_weight * task), "task": task, **terms}

    def validation_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the task's loss without label smoothing, for the validation of a search."""
        return Classification().loss(logits, target) if self.smoothed else self.task(logits, target)

    @torch.compiler.disable  # its counter would cause a recompilation at every call
    def _progress(self) -> float:
        if self.steps is None:
            if self.method.steady:
                return 1.0
            raise UserError(
                "the loss weights depend on the progress of the training: pass Distiller(..., steps=N) or "
                "distiller(x, y, progress=...)"
            )
        progress = min(1.0, self.calls / max(1, self.steps - 1))
        self.calls += self.training
        if self.training and self.calls == self.steps + 1:
            warnings.warn(f"more training calls than steps={self.steps}: the last loss weights are kept", stacklevel=4)
        return progress

    def get_extra_state(self) -> Tensor:
        """Save the number of training calls, so that a loop that restores `state_dict()` resumes from there."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to optimise."""
        return [p for part in (self.student, self.method) for p in part.parameters() if p.requires_grad]
