"""Search by trials: which kinds of pathways a student should learn from, found by short trainings with some of them.

A pathway can help at first and cost accuracy once the learning rate has fallen, or the other way round. The gradient
one step ahead (`distpro.gradient_search`) does not see that; a whole short training does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from distpro import parallel
from distpro.distillation import distill
from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.files import whole_file
from distpro.loop import Observer, image_shape
from distpro.methods import DistPro
from distpro.pathways import Pathway
from distpro.process import Process
from distpro.recipe import Recipe


class Trial(NamedTuple):
    """One short training: the pathways kept, the seed of the initial weights, and the result."""

    kept: tuple[int, ...]
    seed: int
    top1: float
    seconds: float


def by_depth(pathway: Pathway) -> str:
    """Return how far apart the two stages are, and in which direction."""
    if pathway.teacher == 0:
        return pathway.name  # of logits: each loss is a kind of its own
    deeper = pathway.student - pathway.teacher
    return {0: "same stage", 1: "student one stage deeper"}.get(
        deeper, "student deeper" if deeper > 0 else "student shallower"
    )


def by_transform(pathway: Pathway) -> str:
    return f"transform {pathway.transform}" if pathway.teacher else pathway.name


KINDS: tuple[Callable[[Pathway], str], ...] = (by_depth, by_transform)  # decided on in this order


def search_by_trials(
    student: Callable[[int], nn.Module],
    teacher: nn.Module,
    train: Any,
    validation: Any,
    recipe: Recipe,
    *,
    image: Sequence[int] | None = None,
    seeds: Sequence[int] = (0,),
    record: Path | None = None,
    facts: dict[str, Any] | None = None,
    observer: Observer | None = None,
    cuda_graphs: bool | None = None,
    **options: Any,
) -> Process:
    """Search a constant process: the kinds of pathways without which short trainings end worse.

    Kinds are chosen by the distance between the stages, then by the transform (see `stepwise`). All trials share
    their seeds, initial weights and batches, and the pathways of a trial share the same total weight.

    student: creates a student from a seed.
    train, validation: iterables of `(x [N, C, H, W], y [N])` with a length, of disjoint images; neither may include
        the images of the final test.
    recipe: of one trial; its learning rate should fall to 0.
    seeds: a choice is judged by the mean over them.
    record: a JSON file of the trials; those already in it are not run again.
    facts: metadata to store with the process, besides the trials.
    cuda_graphs: see `distpro.graphs`; on by default on a GPU.
    options: of `Distiller` (kd_weight, transforms, pooled, precision, ...); they determine the pathways to choose from.
    """
    shape = image_shape(train, image)
    method = Distiller(student(seeds[0]), teacher, image=shape, **options).method
    assert isinstance(method, DistPro)
    paths = method.paths.pathways
    if len(paths) < 2:
        raise UserError("a search by trials needs at least two pathways")
    known: list[Trial] = []
    if record is not None and parallel.is_file(record):
        known = [Trial(tuple(t[0]), *t[1:]) for t in json.loads(record.read_text())]

    def run(kept: tuple[int, ...], seed: int) -> Trial:
        for trial in known:
            if (trial.kept, trial.seed) == (kept, seed):
                return trial
        rows = distill(
            student(seed),
            teacher,
            train,
            recipe,
            process=Process.keeping(kept, paths),
            test=validation,
            image=shape,
            name=f"trial {len(known) + 1}",
            observer=observer,
            cuda_graphs=cuda_graphs,
            **options,
        )
        seconds = sum(row["seconds"] for row in rows)
        known.append(Trial(kept, seed, rows[-1]["test_top1"], round(seconds, 2)))
        if record is not None:
            with whole_file(record) as part:
                part.write_text(json.dumps(known))
        return known[-1]

    def top1(kept: tuple[int, ...]) -> float:
        return sum(run(kept, seed).top1 for seed in seeds) / len(seeds)

    kept = tuple(range(len(paths)))
    worth: dict[frozenset[str], float] = {}
    for kind in KINDS:
        kept, seen = stepwise(paths, kept, kind, top1)
        worth |= seen
    results = [{"kinds": sorted(kinds), "top1": round(value, 2)} for kinds, value in worth.items()]
    seconds = round(sum(trial.seconds for trial in known), 2)
    facts = {**(facts or {}), "trials": len(known), "seconds": seconds, "top-1 of trials": results}
    return Process.keeping(kept, paths, facts=facts)


def stepwise(
    paths: Sequence[Pathway],
    among: tuple[int, ...],
    kind: Callable[[Pathway], str],
    top1: Callable[[tuple[int, ...]], float],
) -> tuple[tuple[int, ...], dict[frozenset[str], float]]:
    """Return which of the pathways `among` (by index) to keep, and the top-1 of each choice of kinds.

    Starting from the best of all kinds together and each kind alone, a kind is added or removed as long as that raises
    `top1(kept)`, the best such step first.
    """
    names = list(dict.fromkeys(kind(paths[p]) for p in among))
    if len(names) == 1:
        return among, {}

    def of(kinds: frozenset[str]) -> tuple[int, ...]:
        return tuple(p for p in among if kind(paths[p]) in kinds)

    steps = [frozenset(names), *(frozenset([name]) for name in names)]
    choice, best = steps[0], -math.inf
    worth: dict[frozenset[str], float] = {}
    while True:
        for step in steps:
            worth.setdefault(step, top1(of(step)))
        ahead = max(steps, key=worth.__getitem__)
        if worth[ahead] <= best:
            return of(choice), worth
        choice, best = ahead, worth[ahead]
        steps = [choice ^ {name} for name in names if choice != {name}]
