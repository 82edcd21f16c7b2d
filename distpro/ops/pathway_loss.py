"""The feature losses of all pathways and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HCL_LEVELS = (4, 2, 1)


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps of one shape."""
    return (student - teacher).square().mean()


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of two maps of one shape."""
    return (student - teacher).abs().mean()


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of two maps `[N, C, H, W]` (Chen et al., ReviewKD, CVPR 2021).

    The mean squared difference of the full maps, and of the maps pooled to l x l for each l in (4, 2, 1) with
    l < H, weighted 1, 1/2, 1/4, 1/8 in the order used and divided by the sum of these weights. Pooling is
    linear, so the difference is pooled once instead of both maps.
    """
    difference = student - teacher
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for level in HCL_LEVELS:
        if level < difference.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
    return total / weights


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hcl": hcl, "l2": l2, "l1": l1}


def pathway_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, distance: str = "hcl"
) -> tuple[Tensor, Tensor]:
    """`(loss, per_pathway)`: the weighted sum of P feature losses (Eq. 2's inner sum), and the P losses `[P]`.

    `students[p]` and `teachers[p]` are maps `[N, C, H, W]` of one shape (tokens `[N, L, C]` with l2 and l1);
    `weights` is `[P]`. Gradients flow to the students and the weights through both results.

    Equivalent to:
        per_pathway = torch.stack([DISTANCES[distance](s, t) for s, t in zip(students, teachers)])
        loss = (weights * per_pathway).sum()
    """
    measure = DISTANCES[distance]
    if not students:
        empty = weights.new_zeros(0)
        return empty.sum(), empty
    losses = [measure(s, t) for s, t in zip(students, teachers, strict=True)]
    per_pathway = torch.stack(losses)
    return (weights.to(per_pathway.dtype) * per_pathway).sum(), per_pathway
