"""Parameters moved a small step to either side along a direction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpro import _native
from distpro.errors import UserError
from distpro.ops import _library, reference
from distpro.ops._library import addresses


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], radius: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """`(plus, minus, epsilon)`: new tensors `parameters +- epsilon * direction`, and epsilon `[]`.

    parameters, direction: equally many tensors, pairwise of the same shape, all float32 or all float64 on one device
        (in a 16-bit dtype most parameters would not move at all). Neither is modified.
    radius: epsilon = radius / norm, with the L2 norm over all of `direction`.

    If the norm is 0, epsilon is 0; if it is not finite, epsilon, plus and minus are NaN. Nothing is read back to
    the host. The results carry no gradient: `UserError` in forward mode, `RuntimeError` in backward.

    Equivalent to:
        epsilon = radius / torch.cat([d.flatten() for d in direction]).norm()
        plus = [p + epsilon * d for p, d in zip(parameters, direction)]
        minus = [p - epsilon * d for p, d in zip(parameters, direction)]
    """
    if len(parameters) != len(direction) or not parameters:
        raise UserError(
            f"perturb: {len(parameters)} parameters and {len(direction)} directions: expected equal numbers, at least 1"
        )
    first = parameters[0]
    for k, (p, d) in enumerate(zip(parameters, direction, strict=True)):
        if p.shape != d.shape:
            raise UserError(f"perturb: parameter {k} is {list(p.shape)}, its direction {list(d.shape)}")
        if not (p.dtype == d.dtype == first.dtype and p.device == d.device == first.device):
            raise UserError(f"perturb: parameter {k} or its direction differs in dtype or device from parameter 0")
    _library.check_dtype("perturb", first.dtype, (torch.float32, torch.float64))
    if not _library.has_kernels(first.device.type, first.device.index):
        return reference.perturb(parameters, direction, radius)
    _library.refuse_forward_mode("perturb", [*parameters, *direction])
    return torch.ops.distpro.perturb(parameters, direction, radius)


# -- the operator ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _plan(dtype: torch.dtype, sizes: Any, tile_elements: int) -> Any:
    kernels: Any = _native.native()
    return kernels.VectorPlan.perturb(_library.dtype_code(kernels, dtype), sizes, tile_elements)


def _run(parameters: list[Tensor], direction: list[Tensor], radius: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    kernels: Any = _native.native()
    parameters = _library.dense(parameters, parameters)
    direction = _library.dense(direction, parameters)
    plus, minus, epsilon = _fake(parameters, direction, radius)
    first = parameters[0]
    some = [k for k, p in enumerate(parameters) if p.numel()]  # the kernels do not take empty tensors
    if not some:
        return plus, minus, epsilon.zero_()
    tile_elements = _library.TILE_ELEMENTS[first.device.type]
    plan = _plan(first.dtype, tuple(parameters[k].numel() for k in some), tile_elements)
    partials = first.new_empty(plan.partials, dtype=torch.float64)
    lists = [addresses([tensors[k] for k in some]) for tensors in (parameters, direction, plus, minus)]
    with _library.stream_on(first.device) as stream:
        kernels.perturb(plan, *lists, radius, epsilon.data_ptr(), partials.data_ptr(), stream)
    return plus, minus, epsilon


def _fake(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], radius: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    parameters = _library.dense(parameters, parameters)  # empty_like keeps their strides
    plus = [torch.empty_like(p) for p in parameters]
    minus = [torch.empty_like(p) for p in parameters]
    return plus, minus, parameters[0].new_empty(())


_NAME = _library.register(
    "perturb(Tensor[] parameters, Tensor[] direction, float radius) -> (Tensor[] plus, Tensor[] minus, Tensor epsilon)",
    _run,
    _fake,
)
_library.refuse_backward(_NAME, "perturb carries no gradient")
