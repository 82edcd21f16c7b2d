"""Phase 1 by meta-gradients: the process descends the validation loss while a student trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.loop import Observer, fit, image_shape
from distpro.planned_step import graphed
from distpro.process import TAU, Process
from distpro.recipe import Recipe
from distpro.search_step import SearchStep
from distpro.tasks import after_epochs


def search_by_gradient(
    student: nn.Module,
    teacher: nn.Module,
    train: Any,
    validation: Any,
    recipe: Recipe,
    *,
    image: Sequence[int] | None = None,
    normalisation: str = "biased-softmax",
    hypergradient: str = "exact",
    alpha_lr: float = 0.05,
    alpha_first: bool = False,
    alpha_every: int = 1,
    literal_xi: bool = False,
    val_ema: float | None = None,
    tau: float | None = TAU,
    facts: dict[str, Any] | None = None,
    test: Any = None,
    history: list[dict[str, float]] | None = None,
    name: str = "search",
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    cuda_graphs: bool | None = None,
    **options: Any,
) -> Process:
    """Search a process for this pair of networks, training the student along the way.

    The student is usually discarded; with few images in `validation`, it can itself be the result, its process
    learned online (`--process online`).

    train, validation: iterables of `(x [N, C, H, W], y [N])` with a length, of disjoint images (the paper: 80 % and
        20 % of the training set).
    test: if given, the student's accuracy on it is measured after every epoch, and selects nothing.
    history: a list that receives one row per epoch (losses, lr, seconds, test accuracy).
    hypergradient, alpha_lr, alpha_first, alpha_every, literal_xi, val_ema: see `SearchStep`.
    facts: metadata to store with the process.
    cuda_graphs: see `distpro.graphs`; on by default on a GPU.
    options: of `Distiller` (kd_weight, transforms, pathways, pooled, precision, student_layers, sync_bn, task, ...).
    """
    if recipe.grad_accum_steps > 1:
        raise UserError("--grad-accum-steps only applies to the distillation: a search by gradient takes whole batches")
    if recipe.ema is not None:
        raise UserError("--ema only applies to the distillation, not to a search by gradient")
    shape = image_shape(train, image)
    image_shape(validation, shape)  # fails if there is no batch
    options = {"label_smoothing": recipe.label_smoothing} | options
    distiller = Distiller(student, teacher, image=shape, **options).train()
    optimizer = recipe.optimizer(distiller.trainable_parameters())
    step = SearchStep(
        distiller,
        optimizer,
        validation,
        steps=recipe.epochs * len(train),
        normalisation=normalisation,
        hypergradient=hypergradient,
        alpha_lr=alpha_lr,
        alpha_first=alpha_first,
        alpha_every=alpha_every,
        literal_xi=literal_xi,
        val_ema=val_ema,
    )
    rows = fit(
        graphed(step, step.z.device, observer or Observer(), cuda_graphs),
        train,
        recipe.scheduler(optimizer, len(train)),
        recipe.epochs,
        name=name,
        evaluate=after_epochs(lambda: student, test, options.get("task")),
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
        max_steps=recipe.max_steps,
    )
    if history is not None:
        history += rows
    facts = {**(facts or {}), "steps": step.taken, "seconds": round(sum(row["seconds"] for row in rows), 2)}
    return Process(step.z_record[: step.taken], step.pathways.pathways, normalisation, tau, facts)
