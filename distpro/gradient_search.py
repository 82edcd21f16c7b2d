"""Phase 1 by meta-gradients: the process falls down the validation loss while a student trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distpro import parallel
from distpro.errors import UserError
from distpro.features import Features, Teacher, same_classes
from distpro.loop import Observer, fit, picture_shape
from distpro.pathways import Pathways, all_pathways
from distpro.planned_step import graphed
from distpro.precision import PLAIN, Precision
from distpro.process import TAU, WARM_UP, Process
from distpro.recipe import Recipe
from distpro.search_step import SearchStep
from distpro.tasks import Classification


def search_by_gradient(
    student: nn.Module,
    teacher: nn.Module,
    train: Any,
    validation: Any,
    recipe: Recipe,
    *,
    image: Sequence[int] | None = None,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    transforms: str = "ABC",
    pathways: str = "all",
    distance: str = "hcl",
    pooled: bool = False,
    logit_pathways: Sequence[str] = (),
    precision: Precision = PLAIN,
    kd_weight: float = 1.0,
    warm_up: float = WARM_UP,
    sync_bn: bool = False,
    normalisation: str = "biased-softmax",
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
    """Search a process for this pair; the student is trained on the way.

    The student is usually thrown away; with few pictures in `validation` it can be the result itself, its process
    learned online (`--process online`).

    train, validation: iterables of `(x [N, C, H, W], y [N])` with a length, of disjoint pictures (the paper: 80 %
        and 20 % of the training set).
    test: where given, the student's accuracy on it is measured after every epoch, and chooses nothing.
    history: is filled with one row an epoch (losses, lr, seconds, test accuracy).
    sync_bn: BN over the batches of all processes of a job (see `distpro.parallel`).
    cuda_graphs: see `distpro.graphs`; by default where there is a GPU.
    options: of `SearchStep` (hypergradient, alpha_lr, alpha_first, alpha_every, literal_xi).
    """
    if recipe.grad_accum_steps > 1:
        raise UserError("--grad-accum-steps is of the distillation: a search by gradient takes whole batches")
    shape = picture_shape(train, image)
    picture_shape(validation, shape)  # there has to be one
    reader = Features(student, shape, student_layers, pooled).train()
    frozen = Teacher(teacher, shape, teacher_layers, pooled, precision)
    reader.need_stages()
    frozen.need_stages()
    if logit_pathways:
        same_classes(reader, frozen, "a logit pathway")
    paths = all_pathways(len(frozen.shapes), len(reader.shapes), transforms, pathways, logit_pathways)
    blocks = Pathways(paths, reader.shapes, frozen.shapes, distance).to(next(student.parameters()).device)
    for part in (reader, blocks) if sync_bn else ():
        parallel.synchronise(part)
    optimizer = recipe.optimizer([*reader.parameters(), *blocks.parameters()])
    step = SearchStep(
        reader,
        frozen,
        blocks,
        optimizer,
        validation,
        steps=recipe.epochs * len(train),
        kd_weight=kd_weight,
        warm_up=warm_up,
        normalisation=normalisation,
        precision=precision,
        label_smoothing=recipe.label_smoothing,
        **options,
    )

    def evaluate() -> dict[str, float]:
        metrics = Classification().evaluate(reader, test)
        return {f"test_{k}": v for k, v in metrics._asdict().items()}

    rows = fit(
        graphed(step, step.z.device, observer or Observer(), cuda_graphs),
        train,
        recipe.scheduler(optimizer, len(train)),
        recipe.epochs,
        name=name,
        evaluate=evaluate if test is not None else None,
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
        max_steps=recipe.max_steps,
    )
    if history is not None:
        history += rows
    facts = {**(facts or {}), "steps": step.taken, "seconds": round(sum(row["seconds"] for row in rows), 2)}
    return Process(step.z_record[: step.taken], paths, normalisation, tau, facts)
