"""Operators: one file each, with the reference that tests and benchmarks share. Imports nothing of training."""

from distpro.ops.pathway_dots import pathway_dots
from distpro.ops.pathway_loss import DISTANCES, pathway_loss
from distpro.ops.perturb import perturb

__all__ = ["DISTANCES", "pathway_dots", "pathway_loss", "perturb"]
