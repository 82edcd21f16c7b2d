"""Training steps split into what the host decides and what the device does, so that a CUDA graph can capture them.

A step of a small network is some hundreds of launches, which the host issues more slowly than the GPU runs them. A
graph is one launch: numbers that change (rates, weights) reach it in a tensor; what changes the kernels selects it.
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpro import parallel
from distpro.errors import UserError
from distpro.graphs import Backend, CaptureError, CudaGraphs, Graphs
from distpro.loop import Observer, Step
from distpro.precision import to_device


class Plan(NamedTuple):
    """The host's decisions for a step.

    key: everything that determines which kernels run.
    numbers: `[K]` float64 on the CPU, values that change from step to step.
    batches: tensors on the device besides the train batch.
    """

    key: tuple[Any, ...] = ()
    numbers: Tensor = torch.zeros(0, dtype=torch.float64)
    batches: tuple[Tensor, ...] = ()


class PlannedStep(Step):
    """A training step in the separate parts that a graph needs; a call runs them one after another."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def plan(self, progress: float) -> Plan:
        """Run on the host, before the step."""

    @abstractmethod
    def take(self, x: Tensor, y: Tensor, plan: Plan) -> dict[str, Tensor]:
        """Run on the device only, reading nothing back; `plan.numbers` are on the device."""

    def after(self) -> None:
        """Run on the host, after the step."""

    def why_eager(self) -> str | None:
        """Return why this step cannot be captured, or None if it can; called once a step was taken."""
        return f"{parallel.world_size()} processes share the batch" if parallel.world_size() > 1 else None

    def __call__(self, x: Tensor, y: Tensor, progress: float) -> dict[str, Tensor]:
        plan = self.plan(progress)
        x, y, numbers, *batches = self.to_device(x, y, plan.numbers, *plan.batches)
        losses = self.take(x, y, Plan(plan.key, numbers, tuple(batches)))
        self.after()
        return losses

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Move tensors to the device of the parameters."""
        device = self.optimizer.param_groups[0]["params"][0].device
        return [to_device(tensor, device) for tensor in tensors]


class Graphed:
    """A step replayed as graphs, to the same parameters; it reports why if it has to fall back to eager for good."""

    def __init__(self, step: PlannedStep, backend: Backend, say: Callable[[str], None] = lambda line: None) -> None:
        self.step, self.say = step, say
        self.graphs: Graphs | None = Graphs(backend)
        self.taken = 0

    def __call__(self, x: Tensor, y: Tensor, progress: float) -> dict[str, Tensor]:
        reason = self.step.why_eager() if self.taken and self.graphs is not None else None
        if reason:
            self._give_up(reason)
        if self.graphs is None:
            return self.step(x, y, progress)
        plan = self.step.plan(progress)
        rates = torch.tensor([group["lr"] for group in self.step.optimizer.param_groups], dtype=torch.float64)
        inputs = (x, y, torch.cat([rates, plan.numbers]), *plan.batches)
        try:
            losses = self.graphs(plan.key, self._take, *inputs)
        except CaptureError as error:
            self._give_up(str(error))
        if self.graphs is None:  # not in the handler, where the error would still hold the memory of the failed pass
            losses = self._take(plan.key, *self.step.to_device(*inputs))
        self.step.after()
        self.taken += 1
        return losses

    def _take(self, key: tuple[Any, ...], x: Tensor, y: Tensor, numbers: Tensor, *batches: Tensor) -> dict[str, Tensor]:
        """Call `step.take` with the learning rates on the device; the scheduler keeps them on the host."""
        groups = self.step.optimizer.param_groups
        rates, numbers = numbers[: len(groups)], numbers[len(groups) :]
        on_host = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate.to(group["params"][0].dtype)
        try:
            return self.step.take(x, y, Plan(key, numbers, batches))
        finally:
            for group, rate in zip(groups, on_host, strict=True):
                group["lr"] = rate

    def _give_up(self, reason: str) -> None:
        self.graphs = None
        self.say(f"steps run without CUDA graphs: {reason}")

    def sync_ranks(self) -> None:
        self.step.sync_ranks()

    def state_dict(self) -> dict[str, Any]:
        return self.step.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state)


def graphed(step: PlannedStep, device: torch.device, observer: Observer, wanted: bool | None = None) -> Step:
    """Return the step as graphs on a GPU, unless `wanted` is False; elsewhere the step itself."""
    check_graphs(device, wanted)
    if device.type != "cuda" or wanted is False:
        return step
    gc.collect()  # the graphs of an earlier training are in reference cycles and hold much memory
    return Graphed(step, CudaGraphs(device), observer.note)


def check_graphs(device: torch.device, wanted: bool | None) -> None:
    """Raise a `UserError` if graphs are wanted on a device without them."""
    if wanted and device.type != "cuda":
        raise UserError(f"CUDA graphs need a GPU, this job runs on {device.type}: leave --cuda-graphs out")
