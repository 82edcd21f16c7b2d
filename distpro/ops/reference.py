"""What the operators compute, in plain PyTorch: the specification that tests and benchmarks compare with.

DISTPRO_NATIVE=0 runs these in place of the kernels. They compose PyTorch's own operators, so every kind of
differentiation works through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HCL_LEVELS = (4, 2, 1)


def l2(difference: Tensor) -> Tensor:
    """Mean square."""
    return difference.square().mean()


def l1(difference: Tensor) -> Tensor:
    """Mean absolute value."""
    return difference.abs().mean()


def hcl(difference: Tensor) -> Tensor:
    """Hierarchical context loss of `student - teacher` `[N, C, H, W]` (Chen et al., ReviewKD, CVPR 2021).

    The mean square of the full map, and of the map pooled to l x l for each l in (4, 2, 1) with l < H, weighted
    1, 1/2, 1/4, 1/8 in the order used and divided by the sum of these weights. Pooling is linear, so the
    difference is pooled once instead of both maps.
    """
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for level in HCL_LEVELS:
        if level < difference.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, level).square().mean()
    return total / weights


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {"hcl": hcl, "l2": l2, "l1": l1}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and losses: float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pathway_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, distance: str = "hcl"
) -> tuple[Tensor, Tensor]:
    """`(loss, per_pathway)`, see `distpro.ops.pathway_loss`; P >= 1."""
    measure = DISTANCES[distance]
    losses = []
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        kind = accumulation(torch.promote_types(student.dtype, teacher.dtype))
        difference = student.to(kind) - teacher.to(kind)
        losses.append(measure(torch.where(weight != 0, difference, 0)))  # a dropped map may hold anything
    per_pathway = torch.stack(losses)
    return (weights.to(per_pathway.dtype) * per_pathway).sum(), per_pathway


def pathway_dots(left: Sequence[Tensor], right: Sequence[Tensor], pathway_of: Sequence[int], pathways: int) -> Tensor:
    """Inner products `[P]`, see `distpro.ops.pathway_dots`."""
    kind = accumulation(left[0].dtype)
    dots = torch.stack([(a.to(kind) * b.to(kind)).sum() for a, b in zip(left, right, strict=True)])
    if list(pathway_of) == list(range(pathways)):
        return dots
    # not index_add: its index would have to be copied to the device, which a CUDA graph cannot capture
    mine = [[d for d, q in zip(dots, pathway_of, strict=True) if q == p] for p in range(pathways)]
    return torch.stack([sum(each, dots.new_zeros(())) for each in mine])


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], radius: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """`(plus, minus, epsilon)`, see `distpro.ops.perturb`."""
    norm = torch.stack(torch._foreach_norm(list(direction))).norm()
    epsilon = torch.where(norm == 0, 0, radius / norm)
    epsilon = torch.where(norm.isfinite(), epsilon, torch.nan)
    steps = [epsilon * d for d in direction]
    plus = [p + s for p, s in zip(parameters, steps, strict=True)]
    minus = [p - s for p, s in zip(parameters, steps, strict=True)]
    return plus, minus, epsilon
