"""What the numbers of a configuration may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from distpro.errors import UserError, flag

Limit = tuple[str, Callable[[float], bool]]  # in words, and as a test that NaN fails

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
}


def check_limits(values: Mapping[str, Any]) -> None:
    """A `UserError` names the first flag, of those that are there, whose value cannot be."""
    for name, (words, allowed) in LIMITS.items():
        value = values[name]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and not allowed(one):
                raise UserError(f"{flag(name)} must be {words}, got {one}")
