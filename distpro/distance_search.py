"""Search by distance: from which of the student's stages each stage of the teacher can be told best.

One student trains with all pathways at equal weights. Then each stage of the teacher keeps the pathway whose
transformed student map is closest to it on held-out images: a stage that cannot show what the teacher's shows is not
made to try. Those kept are weighted by the inverse root of their distances: the scale of a teacher's maps differs
20-fold between its stages, and says nothing of their worth. Their losses are then those of the roots, to first order,
and grow with the scale of a teacher's maps, not with its square: the best kd_weight was 5 to 8 on three pairs, and 13
on one whose teacher's maps are 4 to 6 times as far (by the mean root; RESULTS.md). Unlike a gradient a step ahead
(`distpro.gradient_search`) this becomes clearer with every epoch, and it takes one short training where a search by
trials (`distpro.trials`) takes eight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro import parallel
from distpro.distillation import run
from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.layers import evaluating
from distpro.loop import Observer, image_shape
from distpro.methods import DistPro
from distpro.pathways import Pathway
from distpro.precision import to_device
from distpro.process import Process
from distpro.recipe import Recipe


def search_by_distance(
    student: nn.Module,
    teacher: nn.Module,
    train: Any,
    validation: Any,
    recipe: Recipe,
    *,
    image: Sequence[int] | None = None,
    facts: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    cuda_graphs: bool | None = None,
    **options: Any,
) -> Process:
    """Search a constant process: for each stage of the teacher the pathway of the least distance d, weighted by d^-0.5.

    The weights have the mean over the pathways kept of d^-0.5 as their sum.

    The student is trained along the way, and usually discarded.

    train, validation: iterables of `(x [N, C, H, W], y [N])` with a length, of disjoint images; neither may include
        the images of the final test.
    recipe: of the training with uniform weights; its `ema` is ignored.
    facts: metadata to store with the process, besides the distances.
    cuda_graphs: see `distpro.graphs`; on by default on a GPU.
    options: of `Distiller` (kd_weight, transforms, pooled, precision, ...); they determine the pathways to choose from.
    """
    shape = image_shape(train, image)
    image_shape(validation, shape)  # fails if there is no batch
    distiller = Distiller(student, teacher, image=shape, **{"label_smoothing": recipe.label_smoothing} | options)
    assert isinstance(distiller.method, DistPro)
    pathways = distiller.method.paths.pathways
    check_choice(pathways)
    rows = run(
        distiller,
        train,
        replace(recipe, ema=None),
        name="search",
        checkpoint=checkpoint,
        resume=resume,
        observer=observer,
        cuda_graphs=cuda_graphs,
    )
    found = distances(distiller, validation).tolist()
    facts = {
        **(facts or {}),
        "seconds": round(sum(row["seconds"] for row in rows), 2),
        "distances": {p.name: float(f"{value:.5g}") for p, value in zip(pathways, found, strict=True)},
    }
    kept = closest(pathways, found)
    return Process.keeping(kept, pathways, weights(kept, found), facts=facts)


def check_choice(pathways: Sequence[Pathway]) -> None:
    """Raise a `UserError` if distances decide nothing between these pathways."""
    logits = next((p.name for p in pathways if not p.teacher), None)
    if logits:
        raise UserError(f"a search by distance compares feature maps, and {logits} has none: take --search-by trials")
    if len({p.teacher for p in pathways}) == len(pathways):
        raise UserError(
            "a search by distance has nothing to choose where each of the teacher's stages has one pathway: take "
            "--process uniform, or --search-by gradient to weigh them"
        )


@torch.no_grad()
def distances(distiller: Distiller, loader: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return each pathway's mean loss `[P]` over all images of the loader, float64 on the CPU, in eval mode.

    In a distributed job each process's loader has its own share; the means cover all of them.
    """
    method, teacher, precision = distiller.method, distiller.teacher, distiller.precision
    assert isinstance(method, DistPro)
    assert teacher is not None
    weight = next(distiller.student.parameters()).new_ones(len(method.paths))
    sums = torch.zeros(len(weight) + 1, dtype=torch.float64, device=weight.device)  # of losses; images
    with evaluating(distiller):
        for x, y in loader:
            x, y = precision.layout(to_device(x, weight.device)), to_device(y, weight.device)
            with precision.autocast(x.device):
                output = distiller.student(x)
                _, each = method.paths(method.paths.sources(output), teacher(x), y, weight)
            sums += len(x) * torch.cat([each.double(), sums.new_ones(1)])
    *totals, images = parallel.all_reduce_sum(sums).cpu()
    return torch.stack(totals) / images


def closest(pathways: Sequence[Pathway], found: Sequence[float]) -> list[int]:
    """Return for each of the teacher's stages the index of the pathway of the least distance."""
    stages = sorted({p.teacher for p in pathways})
    return [min((i for i, p in enumerate(pathways) if p.teacher == stage), key=found.__getitem__) for stage in stages]


def weights(kept: Sequence[int], found: Sequence[float]) -> list[float]:
    """Return the weight of each of the K pathways kept, by index, from the distances d of all: d^-0.5 / K.

    To first order the loss is then the mean of twice the roots of the distances.
    """
    least = 1e-6 * max(found[i] for i in kept) or 1.0  # of a map that is met exactly
    return [max(found[i], least) ** -0.5 / len(kept) for i in kept]
