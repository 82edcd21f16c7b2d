"""`python benchmarks/reviewkd_weighted.py PROCESS ...`: distpro.train with ReviewKD's stages weighted as PROCESS does.

A control (RESULTS.md, "The weight of each method"): are the weights of a search by distance worth as much without its
choice of pathways? PROCESS is a zoo:NAME or a file with one pathway to each stage of the teacher; the weights of the
stages have a mean of 1. What follows it are flags of distpro.train, `--method reviewkd` among them.
"""

from __future__ import annotations

import sys

import torch

from distpro.errors import run_command
from distpro.methods import METHODS, Moment
from distpro.methods.reviewkd import ReviewKD
from distpro.process import Process
from distpro.train import main
from distpro.zoo import process_file


class WeightedReviewKD(ReviewKD):
    weights: torch.Tensor

    def moment(self, progress: float) -> Moment:
        return Moment(super().moment(progress).weights * self.weights)


def by_stage(process: Process) -> torch.Tensor:
    """Return the weight of each of the teacher's stages, with a mean of 1."""
    weights = process.at(0.0)
    stages = torch.tensor([p.teacher for p in process.pathways])
    each = torch.stack([weights[stages == stage].sum() for stage in stages.unique()])
    return each / each.mean()


if __name__ == "__main__":
    WeightedReviewKD.weights = by_stage(Process.load(process_file(sys.argv.pop(1))))
    METHODS["reviewkd"] = WeightedReviewKD
    run_command(main)
