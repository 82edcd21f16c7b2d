"""Checks of a configuration that need neither data nor networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distpro import zoo
from distpro.defaults import SEARCH
from distpro.errors import UserError, flag, nearest
from distpro.models import check_model, is_own

Limit = tuple[str, Callable[[float], bool]]  # a description, and a predicate that is False for NaN

COUNT: Limit = ("1 or more", lambda v: v >= 1)
NOT_NEGATIVE: Limit = ("0 or more", lambda v: 0 <= v < math.inf)
POSITIVE: Limit = ("above 0", lambda v: 0 < v < math.inf)
SHARE: Limit = ("between 0 and 1", lambda v: 0 <= v <= 1)
PROPER_SHARE: Limit = ("above 0 and below 1", lambda v: 0 < v < 1)
DECAY: Limit = ("0 or more and below 1", lambda v: 0 <= v < 1)

LIMITS: dict[str, Limit] = {
    "epochs": COUNT,
    "teacher_epochs": COUNT,
    "search_epochs": COUNT,
    "batch_size": COUNT,
    "grad_accum_steps": COUNT,
    "alpha_every": COUNT,
    "trial_seeds": COUNT,
    "max_steps": COUNT,
    "threads": COUNT,
    "size_schedule": COUNT,
    "seed": ("0 to 2^63 - 1", lambda v: 0 <= v < 2**63),
    "kd_weight": NOT_NEGATIVE,
    "reviewkd_weight": NOT_NEGATIVE,
    "task_loss_weight": NOT_NEGATIVE,
    "distill_loss_weight": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "temperature": POSITIVE,
    "lr": POSITIVE,
    "alpha_lr": POSITIVE,
    "tau": ("a finite number", math.isfinite),
    "warm_up": SHARE,
    "label_smoothing": SHARE,
    "val_fraction": PROPER_SHARE,
    "momentum": DECAY,
    "ema": DECAY,
    "val_ema": DECAY,
}


# Options that --process online does not use.
OFFLINE: tuple[str, ...] = ("size_schedule", "ema", "compile", "grad_accum_steps", "search_samples", "trial_seeds")
# Options that only one of the searches uses.
OF_SEARCH: dict[str, tuple[str, ...]] = {
    "gradient": (
        "hypergradient",
        "normalisation",
        "tau",
        "alpha_lr",
        "alpha_first",
        "alpha_every",
        "literal_xi",
        "val_ema",
    ),
    "trials": ("trial_seeds",),
}

NO_FILES = ("search", "uniform", "online")  # values of --process that are not files


def check(filled: Any) -> None:
    """Raise a `UserError` for the first invalid value of a configuration that `fill` has filled."""
    _limits(filled)
    for role in ("teacher", "student"):
        _network(getattr(filled, role))
    if filled.method in ("all", "distpro"):
        _process(filled.process)
        _uses(filled)
    if filled.resume and filled.output is None:
        raise UserError("--resume needs --output, the folder of the run to resume")
    weights = {
        "--teacher zoo:": filled.teacher.startswith(zoo.PREFIX),
        "--teacher-checkpoint": filled.teacher_checkpoint,
        "--teacher-pretrained": filled.teacher_pretrained,
    }
    given = [name for name, value in weights.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} are mutually exclusive")


def _limits(filled: Any) -> None:
    for name, (words, allowed) in LIMITS.items():
        value = getattr(filled, name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not allowed(one):
                raise UserError(f"{flag(name)} must be {words}, got {one}")


def _network(name: str) -> None:
    """Raise a `UserError` if there is no such network; a user's own is looked up when it is created."""
    if name.startswith(zoo.PREFIX):
        zoo.find("teacher", name)
    elif not is_own(name):
        check_model(name)


def _process(name: str) -> None:
    """Raise a `UserError` if this is no process; files are looked up when they are read."""
    if name in NO_FILES or any(mark in name for mark in ":./") or Path(name).exists():
        return
    close = nearest(name, NO_FILES)
    hint = f": did you mean {close[0]!r}?" if close else f": expected {', '.join(NO_FILES)}, FILE, or zoo:NAME"
    raise UserError(f"unknown process '{name}'{hint}")


def _uses(filled: Any) -> None:
    """Raise a `UserError` for an option that the chosen search does not use."""
    if filled.process == "online":
        if filled.search_by != "gradient":
            raise UserError(
                f"--search-by {filled.search_by} is not supported with --process online, which searches by gradient"
            )
        unused = dict.fromkeys(OFFLINE, "is not supported with --process online")
    elif filled.process == "search":
        unused = {
            name: f"only applies to a search by {search}: give --search-by {search}"
            for search, names in OF_SEARCH.items()
            if search != filled.search_by
            for name in names
        }
    elif filled.process == "uniform":
        unused = {"tau": "does nothing with --process uniform, whose weights are all alike"}
    else:
        return
    for name, why in unused.items():
        if getattr(filled, name) != SEARCH.get(name, getattr(type(filled), name)):
            raise UserError(f"{flag(name)} {why}")
