"""One step of the search: the student descends the train loss, the process's raw weights the validation loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from distpro import parallel
from distpro.distiller import Distiller
from distpro.errors import UserError, unknown
from distpro.features import Output
from distpro.graphs import capturing
from distpro.hypergradient import RADIUS, Stateless, exact, finite_difference, step_sizes, through_normalisation
from distpro.loop import repeated
from distpro.methods import DistPro
from distpro.planned_step import Plan, PlannedStep
from distpro.process import normaliser, warmed

HYPERGRADIENTS = ("exact", "finite-difference")
ALPHA_BETAS = (0.5, 0.9)  # of Adam on z; a second moment over 1000 steps would freeze z
LITERAL_BETAS = (0.5, 0.999)  # those of DARTS and of the authors' release


class TrainPass(NamedTuple):
    """What the hypergradient needs of a train pass."""

    losses: dict[str, Tensor]
    at_sources: tuple[Tensor | None, ...]  # the loss's gradient at each pathway's own alias of the student's map
    factors: Tensor  # w * a_p `[P]`, included in these gradients
    taught: Output  # the teacher's


class SearchStep(PlannedStep):
    """One step of the student on a train batch, and one of the raw weights z down the validation loss.

    Per step (Eq. 2, 4, 5): the train backward gives the gradient of the student and, at each pathway's own alias of
    the student's map, that pathway's; the optimizer's actual step gives theta', which is kept; the student alone is
    differentiated on the validation batch at theta', or at a moving average that theta' enters; the hypergradient is
    computed at theta; Adam updates z. Only the train pass updates buffers.

    distiller: of method "distpro"; its networks, pathways, task, weight, warm-up and precision are used, but not its
        process, which is searched.
    optimizer: plain SGD over `distiller.trainable_parameters()`.
    validation: an iterable of `(x, y)`, repeated endlessly; its loss is the task's, without label smoothing.
    alpha_first: update z first and take the train step again with the new weights (Algorithm 1 read literally).
    alpha_every: update z only every N steps, with N times the learning rate.
    literal_xi: keep the student's step size xi in the gradient that Adam sees, as in Eq. 4, and use the release's
        betas. Adam's second moment then remembers the large early gradients, so z freezes for some thousand steps once
        the learning rate has dropped; without literal_xi, z moves alike at every learning rate.
    val_ema: decay of a moving average of theta at which the validation loss is measured; None measures it at theta', as
        in Eq. 4. At a high learning rate theta' overshoots along the largest gradients, so that less of the pathways
        that have them always looks better; their average does not. d L_val / d z is exact for it, up to the common
        factor 1 - val_ema. The first 1 / (1 - val_ema) steps are averaged evenly.
    radius: of the finite difference: epsilon = radius / norm(direction). It is computed in float32 at any precision: a
        difference of two nearly equal losses would keep few digits of a shorter type.
    z_record (attribute): z as used at each step, `[steps, P]`.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        validation: Any,
        *,
        steps: int,
        normalisation: str = "biased-softmax",
        hypergradient: str = "exact",
        alpha_lr: float = 0.05,
        alpha_first: bool = False,
        alpha_every: int = 1,
        literal_xi: bool = False,
        val_ema: float | None = None,
        radius: float = RADIUS,
    ) -> None:
        method, teacher = distiller.method, distiller.teacher
        if type(method) is not DistPro or teacher is None:
            raise UserError(f"a search needs method distpro and a teacher, got method {type(method).__name__}")
        if hypergradient not in HYPERGRADIENTS:
            raise unknown("hypergradient", hypergradient, HYPERGRADIENTS)
        if alpha_every < 1:
            raise UserError(f"--alpha-every must be 1 or more, got {alpha_every}")
        self.student, self.teacher, self.pathways = distiller.student, teacher, method.paths
        self.optimizer, self.validation, self.precision = optimizer, validation, distiller.precision
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self.validated = 0
        self.stateless = Stateless(self.student)
        self.stateless_pathways = Stateless(self.pathways)
        self.theta = self.stateless.parameters
        self.phi = self.stateless_pathways.parameters
        self.full_scale, self.warm_up = method.scale, method.warm_up
        self.scale = self.full_scale
        self.hypergradient, self.radius = hypergradient, radius
        self.alpha_first, self.alpha_every, self.literal_xi = alpha_first, alpha_every, literal_xi
        self.val_ema = val_ema
        self.averages = [] if val_ema is None else [p.detach().clone() for p in self.theta]
        self.task, self.validation_loss = distiller.task, distiller.validation_loss
        device = self.theta[0].device
        self.z = torch.ones(len(self.pathways), device=device, dtype=self.theta[0].dtype)
        self.normalise = normaliser(normalisation, method.paths.pathways, self.z)
        on_gpu = device.type == "cuda"  # where Adam counts its steps on the device, as a graph requires
        betas = LITERAL_BETAS if literal_xi else ALPHA_BETAS
        self.adam = torch.optim.Adam([self.z], lr=alpha_lr * alpha_every, betas=betas, capturable=on_gpu)
        self.z_used = self.z.clone()
        self.z_record = torch.zeros(steps, len(self.pathways), device=device)
        self.taken = 0
        self.uses_rng = False  # whether the last train pass drew random numbers
        step_sizes(optimizer, self.theta)  # fails early on an optimizer that cannot be differentiated

    def plan(self, progress: float) -> Plan:
        """Return the scale of the losses, what to keep of the average; if z is to move, step sizes and a batch."""
        self.scale = self.full_scale * warmed(progress, self.warm_up)
        keep = min(self.val_ema or 0.0, self.taken / (self.taken + 1))
        if self.taken % self.alpha_every:
            return Plan((), torch.tensor([self.scale, keep], dtype=torch.float64))
        if self._batches is None:
            self._batches = repeated(self.validation, self.validated)
        self.validated += 1
        xi = step_sizes(self.optimizer, self.theta)
        most = max(xi) or 1.0
        shares = tuple(k / most for k in xi)
        return Plan(shares, torch.tensor([self.scale, keep, most], dtype=torch.float64), next(self._batches))

    def take(self, x: Tensor, y: Tensor, plan: Plan) -> dict[str, Tensor]:
        x = self.precision.layout(x)
        scale, keep = plan.numbers[:2].to(self.z.dtype)
        self.z_used.copy_(self.z)
        if not plan.key:
            losses = self._train_step(x, y, scale).losses
            self._average(keep)
            return losses
        kept = self._snapshot() if self.alpha_first else None
        losses = self._both_steps(x, y, scale, keep, plan)
        if kept is not None:
            self._put_back(kept)
            losses |= self._train_step(x, y, scale).losses
            self._average(keep)
            self.z_used.copy_(self.z)
        return losses

    def after(self) -> None:
        self.z_record[self.taken] = self.z_used
        self.taken += 1

    def why_eager(self) -> str | None:
        if self.hypergradient != "exact":
            return f"hypergradient {self.hypergradient} resets the random number generators"
        if self.uses_rng:  # from torch's generators; draws from Python's or numpy's are neither seen nor repeated
            return "the student draws random numbers (dropout), and the hypergradient has to repeat them"
        return super().why_eager()

    def _train_step(self, x: Tensor, y: Tensor, scale: Tensor) -> TrainPass:
        """Move theta and phi down the gradient of Eq. 2 with the current weights."""
        factors = scale * self.normalise(self.z)
        with self.precision.autocast(x.device):
            with record_function("teacher"):
                ahead = self.teacher.ahead(x)
            with record_function("student"):
                output = self.student(x)
            with record_function("losses"):
                taught, sources = ahead(), self.pathways.sources(output)
                feature_loss, _ = self.pathways(sources, taught, y, factors)
                task = self.task(output.logits, y)
                loss = task + feature_loss
        parameters = [*self.theta, *self.phi]
        with record_function("backward"):
            # stages before all trained parameters have no gradient
            reached = [source for source in sources if source.requires_grad]
            gradients = torch.autograd.grad(loss, [*parameters, *reached], allow_unused=True)
        parallel.all_reduce_mean(gradients[: len(parameters)])
        rest = iter(gradients[len(parameters) :])
        at_sources = tuple(next(rest) if source.requires_grad else None for source in sources)
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is not None and gradient.stride() != parameter.stride():
                # as backward() does: one such gradient makes SGD launch two kernels per parameter, not one for all
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        with record_function("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)  # leaves no stale gradient to the validation
        losses = {"loss": loss.detach(), "task": task.detach()}
        return TrainPass(losses, at_sources, factors, taught)

    @torch.no_grad()
    def _average(self, keep: Tensor) -> None:
        """Let theta enter its moving average, if there is one."""
        if self.averages:
            # a lerp whose weight is on the device, for a graph to read anew at every replay
            differences = list(torch._foreach_sub([*self.theta], self.averages))
            torch._foreach_mul_(differences, 1 - keep)
            torch._foreach_add_(self.averages, differences)

    def _both_steps(self, x: Tensor, y: Tensor, scale: Tensor, keep: Tensor, plan: Plan) -> dict[str, Tensor]:
        theta = [p.detach().clone() for p in self.theta]
        phi = [p.detach().clone() for p in self.phi] if self.hypergradient == "finite-difference" else []
        random = None if capturing() else _random_state(x.device)
        train = self._train_step(x, y, scale)
        self._average(keep)
        if random is not None:
            self.uses_rng = any(not a.equal(b) for a, b in zip(random, _random_state(x.device), strict=True))

        x_val, y_val = plan.batches
        ahead = [average.detach().requires_grad_() for average in self.averages] or self.theta
        with record_function("validation"):
            with self.precision.autocast(x.device):
                output = self.stateless(ahead, self.precision.layout(x_val))
                val_loss = self.validation_loss(output.logits, y_val)
            v = torch.autograd.grad(val_loss, ahead, allow_unused=True)
            parallel.all_reduce_mean(v)
        direction = [
            torch.zeros_like(p) if g is None else g if share == 1 else g * share
            for g, p, share in zip(v, theta, plan.key, strict=True)
        ]

        # repeat the random numbers (dropout) of the train pass
        again = _from_random_state(random, x.device) if random is not None and self.uses_rng else nullcontext()
        with record_function("hypergradient"), again:
            if self.hypergradient == "exact":
                stages = [p.student for p in self.pathways.pathways]
                h = exact(
                    self.stateless, theta, direction, x, train.at_sources, train.factors, stages, self.precision.amp
                )
            else:
                maps = [t.float() if t.element_size() < 4 else t for t in train.taught.maps]
                taught = Output(train.taught.logits, maps)
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32, emulated, is off by 1.2 % here
                    h = finite_difference(
                        self.stateless, self.stateless_pathways, theta, phi, direction, x, taught, y, self.radius
                    )
        parallel.all_reduce_mean([h])  # for the mean loss: a rank's gradients at its maps are those of the sum
        gradient = through_normalisation(h, self.z, self.normalise, scale)
        most = plan.numbers[2].to(gradient.dtype)
        self.z.grad = gradient * (most * self.alpha_every) if self.literal_xi else gradient
        self.adam.step()
        return train.losses | {"val": val_loss.detach()}

    def _snapshot(self) -> list[tuple[Tensor, Tensor]]:
        """Return every tensor that a train step changes, with a copy: parameters, buffers, momentum."""
        moving = [*self.theta, *self.averages, *self.phi, *self.student.buffers(), *self.pathways.buffers()]
        state = self.optimizer.state
        moving += [b for p in (*self.theta, *self.phi) if (b := state[p].get("momentum_buffer")) is not None]
        return [(tensor, tensor.detach().clone()) for tensor in moving]

    def _put_back(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        known = {id(tensor) for tensor, _ in kept}
        for state in self.optimizer.state.values():
            if state.get("momentum_buffer") is not None and id(state["momentum_buffer"]) not in known:
                state["momentum_buffer"] = None  # created by the step that is undone

    def sync_ranks(self) -> None:
        parallel.sync_ranks([self.student, self.pathways], [self.z, *self.averages])

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "pathways": self.pathways.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "z": self.z,
            "adam": self.adam.state_dict(),
            "z_record": self.z_record,
            "taken": self.taken,
            "validated": self.validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.pathways.load_state_dict(state["pathways"])
        self.optimizer.load_state_dict(state["optimizer"])
        capturable = self.adam.param_groups[0]["capturable"]
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:  # the run may have begun on another device
            group["capturable"] = capturable
        for value in self.adam.state.values():
            value["step"] = value["step"].to(self.z.device if capturable else "cpu")
        with torch.no_grad():
            self.z.copy_(state["z"])
            for average, theirs in zip(self.averages, state.get("averages", ()), strict=True):
                average.copy_(theirs)
            self.z_record.copy_(state["z_record"])
        self.taken, self.validated = state["taken"], state["validated"]
        self._batches = None


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a pass on this device draws from, without synchronising."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _from_random_state(state: list[Tensor], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
