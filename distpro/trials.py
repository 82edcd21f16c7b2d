"""Search by trials: which kinds of pathways a student should learn from, found by short trainings with some of them.

A pathway can help at first and cost accuracy once the learning rate has fallen, or the other way round. The gradient of
one step ahead (`distpro.gradient_search`) does not see that; a short training as a whole does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distpro.distill import distill
from distpro.errors import UserError
from distpro.files import whole_file
from distpro.pathways import Pathway
from distpro.process import Process
from distpro.recipe import Recipe

DROPPED = -20.0  # z of a pathway that was not chosen: next to nothing in the softmax of the others, and below tau


class Trial(NamedTuple):
    """One short training: the pathways that counted, the seed of its weights, and what came of it."""

    kept: tuple[int, ...]
    seed: int
    top1: float
    seconds: float


def chosen(pathways: Sequence[Pathway], kept: Sequence[int], facts: dict[str, Any] | None = None) -> Process:
    """A constant process in which the pathways `kept` share the weight evenly and the others are dropped."""
    z = torch.full((len(pathways),), DROPPED)
    z[list(kept)] = 1.0
    return Process.constant(z, pathways, normalisation="softmax", facts=facts)


def by_depth(pathway: Pathway) -> str:
    """How far apart the two stages are, and which way."""
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
    test: Any,
    recipe: Recipe,
    paths: Sequence[Pathway],
    *,
    seeds: Sequence[int] = (0,),
    record: Path | None = None,
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> Process:
    """A constant process of the kinds of pathways without which short trainings end worse.

    Stepwise selection: beginning with the best of all kinds together and each kind alone, a kind is taken in or left
    out as long as that raises top-1 on `test`, the best such step first. First kinds by the distance between the
    stages, then by the transform. All trials share their seeds, initial weights and batches, and the pathways of a
    trial share the same total weight.

    student: makes a student from a seed.
    train, test: iterables of `(x, y)` with a length, of disjoint pictures, neither of them the real test pictures.
    recipe: of one trial; it should let the learning rate fall to 0.
    paths: what there is to choose from, as `options` make them.
    seeds: a choice is judged by the mean over them.
    record: a JSON file that keeps the trials; those it has already are not run again.
    options: of `distill` (kd_weight, transforms, precision, observer, ...).
    """
    if len(paths) < 2:
        raise UserError("a search by trials needs at least two pathways")
    known: list[Trial] = []
    if record is not None and record.is_file():
        known = [Trial(tuple(t[0]), *t[1:]) for t in json.loads(record.read_text())]

    def run(kept: tuple[int, ...], seed: int) -> Trial:
        for trial in known:
            if (trial.kept, trial.seed) == (kept, seed):
                return trial
        process = chosen(paths, kept)
        name = f"trial {len(known) + 1}"
        rows = distill(student(seed), teacher, train, recipe, process=process, test=test, name=name, **options)
        seconds = sum(row["seconds"] for row in rows)
        known.append(Trial(kept, seed, rows[-1]["test_top1"], round(seconds, 2)))
        if record is not None:
            with whole_file(record) as part:
                part.write_text(json.dumps(known))
        return known[-1]

    def top1(kept: tuple[int, ...]) -> float:
        return sum(run(kept, seed).top1 for seed in seeds) / len(seeds)

    kept = tuple(range(len(paths)))
    told: dict[tuple[str, ...], float] = {}
    for kind in KINDS:
        names = list(dict.fromkeys(kind(paths[p]) for p in kept))
        if len(names) == 1:
            continue
        among = kept

        def measured(choice: frozenset[str], kind: Any = kind, among: tuple[int, ...] = among) -> float:
            value = top1(tuple(p for p in among if kind(paths[p]) in choice))
            told[tuple(sorted(choice))] = round(value, 2)
            return value

        start = {choice: measured(choice) for choice in [frozenset(names), *(frozenset([name]) for name in names)]}
        choice = max(start, key=start.__getitem__)
        best = start[choice]
        while True:
            steps = {step: measured(step) for name in names if (step := choice ^ {name})}
            ahead = max(steps, key=steps.__getitem__)
            if steps[ahead] <= best:
                break
            choice, best = ahead, steps[ahead]
        kept = tuple(p for p in kept if kind(paths[p]) in choice)
    seconds = round(sum(trial.seconds for trial in known), 2)
    seen = [{"kinds": list(kinds), "top1": value} for kinds, value in told.items()]
    return chosen(paths, kept, {**(facts or {}), "trials": len(known), "seconds": seconds, "top-1 of trials": seen})
