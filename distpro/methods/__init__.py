"""Methods: what a student learns from its teacher, one file each.

To add one, write a subclass of `Method` in its own file and add it to `METHODS`. Options named like a command-line flag
take that flag's value.
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
