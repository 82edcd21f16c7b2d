"""Methods: what a student learns from its teacher, one file each.

To add one, write a `Method` in a file of its own and name it in `METHODS`: that is all. Its options that are named like
flags have their values.
"""

from __future__ import annotations

from distpro.methods.base import Method, Moment
from distpro.methods.distpro import DistPro
from distpro.methods.kd import KD
from distpro.methods.none import NoDistillation
from distpro.methods.reviewkd import ReviewKD

METHODS: dict[str, type[Method]] = {
    "none": NoDistillation,
    "kd": KD,
    "reviewkd": ReviewKD,
    "distpro": DistPro,
}

__all__ = ["METHODS", "DistPro", "Method", "Moment"]
