"""Search by trials: which pathways a student should learn from, found by short trainings that leave half of them out.

A pathway can cost accuracy at first and pay after the learning rate has fallen, or the other way round; the gradient of
one step ahead (`distpro.search`) does not see that, a whole short training does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    loss: float
    seconds: float


def chosen(pathways: Sequence[Pathway], kept: Sequence[int], facts: dict[str, Any] | None = None) -> Process:
    """A constant process in which the pathways `kept` share the weight evenly and the others are dropped."""
    z = torch.full((len(pathways),), DROPPED)
    z[list(kept)] = 1.0
    return Process.constant(z, pathways, normalisation="softmax", facts=facts)


def halves(among: Sequence[int], pairs: int, seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random ways to part `among` into two halves: of each pathway, half of all trials have it."""
    generator = torch.Generator().manual_seed(seed)
    parted = []
    for _ in range(pairs):
        order = [among[i] for i in torch.randperm(len(among), generator=generator).tolist()]
        middle = len(order) // 2
        parted.append((tuple(sorted(order[:middle])), tuple(sorted(order[middle:]))))
    return parted


def effects(pairs: Sequence[tuple[Trial, Trial]], among: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What each pathway of `among` adds to top-1, in points, and the standard error of that, `[len(among)]` each.

    The mean, over the pairs, of the half with the pathway minus the half without it. Both halves of a pair share
    their seed, so that what the seed does falls out.
    """
    gains = torch.tensor([a.top1 - b.top1 for a, b in pairs])
    signs = torch.tensor([[1.0 if p in a.kept else -1.0 for p in among] for a, _ in pairs])
    each = signs * gains[:, None]
    error = each.std(0) / len(pairs) ** 0.5 if len(pairs) > 1 else torch.full((len(among),), torch.nan)
    return each.mean(0), error


def search_by_trials(
    student: Callable[[int], nn.Module],
    teacher: nn.Module,
    train: Any,
    test: Any,
    recipe: Recipe,
    paths: Sequence[Pathway],
    *,
    pairs: int = 8,
    rounds: int = 2,
    finals: int = 2,
    seed: int = 0,
    record: Path | None = None,
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> Process:
    """A constant process: the pathways without which short trainings end worse.

    Each round trains `pairs` pairs of students, a random half of the pathways each, and keeps the half of the
    pathways whose presence raised top-1 on `test` most. What was kept after each round, and all pathways together,
    are then tried with the same `finals` seeds; the best of these is the result, so that a search whose rounds
    found nothing ends with the uniform weights.

    student: makes a student from a seed.
    paths: what there is to choose from, as `options` make them.
    train, test: iterables of `(x, y)` with a length, of disjoint pictures, neither of them the real test pictures.
    recipe: of one trial; it should let the learning rate fall to 0.
    record: a JSON file that keeps the trials; those it has already are not run again.
    options: of `distill` (kd_weight, transforms, precision, observer, ...).
    """
    if len(paths) < 2:
        raise UserError("a search by trials needs at least two pathways")
    known: list[Trial] = []
    if record is not None and record.is_file():
        known = [Trial(tuple(t[0]), *t[1:]) for t in json.loads(record.read_text())]

    def run(kept: tuple[int, ...], number: int) -> Trial:
        for trial in known:
            if (trial.kept, trial.seed) == (kept, number):
                return trial
        torch.manual_seed(number)
        name = f"trial {len(known) + 1}"
        process = chosen(paths, kept)
        rows = distill(student(number), teacher, train, recipe, process=process, test=test, name=name, **options)
        seconds = sum(row["seconds"] for row in rows)
        trial = Trial(kept, number, rows[-1]["test_top1"], rows[-1]["test_loss"], round(seconds, 2))
        known.append(trial)
        if record is not None:
            with whole_file(record) as part:
                part.write_text(json.dumps(known))
        return trial

    among = tuple(range(len(paths)))
    candidates = [among]
    told = []
    for turn in range(rounds):
        if len(among) < 2:
            break
        first = seed + 1000 * (turn + 1)
        parted = halves(among, pairs, first)
        tried = [(run(a, first + k), run(b, first + k)) for k, (a, b) in enumerate(parted)]
        gain, error = effects(tried, among)
        names = [paths[p].name for p in among]
        rows = zip(names, gain.tolist(), error.tolist(), strict=True)
        told.append({name: [round(g, 2), round(e, 2)] for name, g, e in rows})
        among = tuple(sorted(among[i] for i in gain.argsort(descending=True)[: max(1, len(among) // 2)].tolist()))
        candidates.append(among)
    seeds = [seed + k for k in range(finals)]
    means = [sum(run(kept, number).top1 for number in seeds) / len(seeds) for kept in candidates]
    best = candidates[max(range(len(candidates)), key=means.__getitem__)]
    facts = {
        **(facts or {}),
        "trials": len(known),
        "seconds": round(sum(trial.seconds for trial in known), 2),
        "points each pathway adds": told,
        "top-1 by pathways kept": {len(kept): round(mean, 2) for kept, mean in zip(candidates, means, strict=True)},
    }
    return chosen(paths, best, facts)
