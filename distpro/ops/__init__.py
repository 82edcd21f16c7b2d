"""Operators, one file each, and the reference that tests and benchmarks share. Imports no training code."""

from distpro.ops.pathway_dots import pathway_dots
from distpro.ops.pathway_loss import DISTANCES, pathway_loss
from distpro.ops.perturb import perturb

__all__ = ["DISTANCES", "pathway_dots", "pathway_loss", "perturb"]
