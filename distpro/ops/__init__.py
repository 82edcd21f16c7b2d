"""Operators: one file each, with the reference that tests and benchmarks share. Imports nothing of training."""

from distpro.ops.pathway_loss import DISTANCES, pathway_loss

__all__ = ["DISTANCES", "pathway_loss"]
