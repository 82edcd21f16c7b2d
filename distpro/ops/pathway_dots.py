"""Inner products of many pairs of tensors at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpro import _native
from distpro.errors import UserError
from distpro.ops import _library, reference
from distpro.ops._library import addresses, memory_format
from distpro.ops.reference import accumulation


def pathway_dots(left: Sequence[Tensor], right: Sequence[Tensor], pathway_of: Sequence[int] | None = None) -> Tensor:
    """`[P]`: the inner product of each pair; with `pathway_of`, entry p is the sum over the pairs k with
    `pathway_of[k] == p`, and P is `max(pathway_of) + 1`.

    left, right: tensors of one dtype (float32, bfloat16, float16 or float64) on one device, at least one of each;
        `left[k]` and `right[k]` have the same shape. They are read in place if they are dense in the same memory
        format, else copied. A right side shared by several pairs is read from memory once.

    The result is float32 (float64 for float64 inputs), summed in double, and bitwise the same for any number of
    threads. It carries no gradient: `UserError` in forward mode, `RuntimeError` in backward.

    Equivalent to: torch.stack([(a * b).sum() for a, b in zip(left, right)])
    """
    pathway_of = range(len(left)) if pathway_of is None else pathway_of
    if not len(left) == len(right) == len(pathway_of):
        raise UserError(f"pathway_dots: {len(left)} left sides, {len(right)} right sides, {len(pathway_of)} pathways")
    if not left:
        raise UserError("pathway_dots needs at least one pair")
    first = left[0]
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape:
            raise UserError(f"pathway_dots: pair {k} has shapes {list(a.shape)} and {list(b.shape)}")
        if {(a.dtype, a.device), (b.dtype, b.device)} != {(first.dtype, first.device)}:
            raise UserError(f"pathway_dots: pair {k} differs in dtype or device from the first tensor")
    pathways = max(pathway_of) + 1
    if not _library.has_kernels(first.device.type, first.device.index):
        return reference.pathway_dots(left, right, pathway_of, pathways)
    _library.check_dtype("pathway_dots", first.dtype)
    _library.refuse_forward_mode("pathway_dots", [*left, *right])
    return torch.ops.distpro.pathway_dots(left, right, list(pathway_of), pathways)


# -- the operator ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _plan(dtype: torch.dtype, sizes: Any, right_of: Any, pathway_of: Any, pathways: int, tile_elements: int) -> Any:
    kernels: Any = _native.native()
    code = _library.dtype_code(kernels, dtype)
    return kernels.VectorPlan.dots(code, sizes, right_of, pathway_of, pathways, tile_elements)


def _run(left: list[Tensor], right: list[Tensor], pathway_of: list[int], pathways: int) -> Tensor:
    kernels: Any = _native.native()
    dots = _fake(left, right, pathway_of, pathways)
    some = [k for k, a in enumerate(left) if a.numel()]  # the kernels do not take empty tensors
    if not some:
        return dots.zero_()
    left, right = [left[k] for k in some], [right[k] for k in some]
    left = _library.dense(left, left)
    right_of, right = _library.dense_once(right, [memory_format(a) for a in left])
    first = left[0]
    plan = _plan(
        first.dtype,
        tuple(a.numel() for a in left),
        right_of,
        tuple(pathway_of[k] for k in some),
        pathways,
        _library.TILE_ELEMENTS[first.device.type],
    )
    partials = first.new_empty(plan.partials, dtype=torch.float64)
    with _library.stream_on(first.device) as stream:
        kernels.pathway_dots(plan, addresses(left), addresses(right), dots.data_ptr(), partials.data_ptr(), stream)
    return dots


def _fake(left: Sequence[Tensor], right: Sequence[Tensor], pathway_of: Sequence[int], pathways: int) -> Tensor:
    return left[0].new_empty(pathways, dtype=accumulation(left[0].dtype))


_NAME = _library.register(
    "pathway_dots(Tensor[] left, Tensor[] right, int[] pathway_of, int pathways) -> Tensor", _run, _fake
)
_library.refuse_backward(_NAME, "pathway_dots carries no gradient")
