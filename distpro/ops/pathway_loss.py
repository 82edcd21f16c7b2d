"""The feature losses of all pathways and their weighted sum, in one pass over the maps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distpro import _native
from distpro.errors import UserError, unknown
from distpro.ops import _library, reference
from distpro.ops._library import addresses, memory_format
from distpro.ops.reference import DISTANCES, HCL_LEVELS, accumulation


def pathway_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, distance: str = "hcl"
) -> tuple[Tensor, Tensor]:
    """`(loss, per_pathway)`: the weighted sum of P feature losses (Eq. 2's inner sum) `[]`, and the P losses `[P]`.

    students, teachers: P maps each, `[N, C, H, W]`, or of any shape for l2 and l1 (tokens `[N, L, C]`);
        `students[p]` and `teachers[p]` have the same shape. float32, bfloat16, float16 or float64 on one device;
        mixed dtypes are first promoted to a common one.
    weights: `[P]`. A pathway of weight 0 is not read: its loss and gradients are 0, whatever its maps hold.
    distance: hcl, l2 or l1.

    Both results are float32 (float64 for float64 maps), and all sums are accumulated in that dtype or wider. Gradients
    flow to the students through both results and to the weights through `loss`. Contiguous and channels_last maps are
    read in place, others are copied; a teacher's map is best in the layout of its students. The results are bitwise
    the same for any number of threads.

    Raises `UserError` for maps that do not match, a teacher's map that requires a gradient, and forward-mode
    differentiation; `RuntimeError` for second derivatives with respect to the students.

    Equivalent to:
        per_pathway = torch.stack([DISTANCES[distance](s - t) for s, t in zip(students, teachers)])
        loss = (weights * per_pathway).sum()
    """
    if distance not in DISTANCES:
        raise unknown("distance", distance, DISTANCES)
    if not len(students) == len(teachers) == weights.shape[0]:
        counts = f"{len(students)} student maps, {len(teachers)} teacher maps, {weights.shape[0]} weights"
        raise UserError(f"{counts}: expected equal numbers")
    if not students:
        empty = weights.new_zeros(0)
        return empty.sum(), empty
    _check(students, teachers, weights, distance)
    if not _library.has_kernels(weights.device.type, weights.device.index):
        return reference.pathway_loss(students, teachers, weights, distance)
    _library.refuse_forward_mode("pathway_loss", [*students, weights])
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in (*students, *teachers)])
    _library.check_dtype("pathway_loss", dtype)
    keep = torch.is_grad_enabled() and any(s.requires_grad for s in students)
    converted = {id(t): t.to(dtype) for t in teachers}
    loss, per_pathway, _ = torch.ops.distpro.pathway_loss(
        [s.to(dtype) for s in students],
        [converted[id(t)] for t in teachers],
        weights.to(accumulation(dtype)),
        distance,
        keep,
    )
    return loss, per_pathway


def _check(students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, distance: str) -> None:
    for p, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape != t.shape:
            raise UserError(f"pathway {p}: the student's map is {list(s.shape)}, the teacher's {list(t.shape)}")
        if distance == "hcl" and s.dim() != 4:
            raise UserError(f"pathway {p}: hcl needs maps [N, C, H, W], got {list(s.shape)}; use l2 or l1 for tokens")
        if s.device != weights.device or t.device != weights.device:
            raise UserError(f"pathway {p}: maps on {s.device} and {t.device}, weights on {weights.device}")
        if t.requires_grad:
            raise UserError(f"pathway {p}: the teacher's map requires a gradient; detach it, teachers are not trained")


# -- the operator ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _plan(dtype: torch.dtype, distance: str, shapes: Any, last: Any, teacher_of: Any, device_type: str) -> Any:
    kernels = _native.native()
    assert kernels is not None
    if distance != "hcl":  # the layout does not matter: any dense map is a flat array
        last = [False] * len(shapes)
        shapes = [(torch.Size(shape).numel(), 1, 1, 1) for shape in shapes]
    layouts = [kernels.Layout.channels_last if x else kernels.Layout.planes for x in last]
    code = _library.dtype_code(kernels, dtype), getattr(kernels.Distance, distance)
    tile = _library.TILE_ELEMENTS[device_type], _library.TILE_CHANNELS[device_type]
    return kernels.PathwayPlan(*code, shapes, layouts, teacher_of, *tile)


def _prepare(students: Sequence[Tensor], teachers: Sequence[Tensor], distance: str) -> tuple[Any, Any, Any]:
    """The plan, and the maps in the layouts that the plan expects."""
    formats = [memory_format(s) for s in students]
    students = _library.dense(students, students)
    teacher_of, teachers = _library.dense_once(teachers, formats)
    shapes = tuple(tuple(s.shape) for s in students)
    last = tuple(f is torch.channels_last for f in formats)
    first = students[0]
    plan = _plan(first.dtype, distance, shapes, last, teacher_of, first.device.type)
    return plan, students, teachers


def _means(students: Sequence[Tensor], distance: str) -> Any:
    """Number of bin means."""
    if distance != "hcl":
        return 0
    return sum(s.shape[0] * s.shape[1] * sum(k * k for k in HCL_LEVELS if k < s.shape[2]) for s in students)


def _forward(
    students: list[Tensor], teachers: list[Tensor], weights: Tensor, distance: str, keep_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels: Any = _native.native()
    plan, students, teachers = _prepare(students, teachers, distance)
    weights = weights.contiguous()
    loss, per_pathway, means = _fake_forward(students, teachers, weights, distance, keep_means)
    partials = weights.new_empty(plan.partials, dtype=torch.float64)
    kept = means.data_ptr() if keep_means else 0
    results = loss.data_ptr(), per_pathway.data_ptr(), kept, partials.data_ptr()
    with _library.stream_on(weights.device) as stream:
        kernels.pathway_loss_forward(
            plan, addresses(students), addresses(teachers), weights.data_ptr(), *results, stream
        )
    return loss, per_pathway, means


def _fake_forward(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, distance: str, keep_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    means = weights.new_empty(_means(students, distance) if keep_means else 0)
    return weights.new_empty(()), weights.new_empty(weights.shape), means


def _backward(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: Tensor,
    means: Tensor,
    grad_loss: Tensor,
    grad_per_pathway: Tensor,
    distance: str,
) -> list[Tensor]:
    kernels: Any = _native.native()
    gradients = [torch.empty_like(s, memory_format=memory_format(s)) for s in students]
    plan, students, teachers = _prepare(students, teachers, distance)
    maps = addresses(students), addresses(teachers), addresses(gradients)
    factors = [weights.contiguous(), grad_loss.contiguous(), grad_per_pathway.contiguous(), means]
    with _library.stream_on(weights.device) as stream:
        kernels.pathway_loss_backward(plan, *maps, *addresses(factors), stream)
    return gradients


def _fake_backward(students: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [torch.empty_like(s, memory_format=memory_format(s)) for s in students]


_FORWARD = _library.register(
    "pathway_loss(Tensor[] students, Tensor[] teachers, Tensor weights, str distance, bool keep_means)"
    " -> (Tensor loss, Tensor per_pathway, Tensor means)",
    _forward,
    _fake_forward,
)
_BACKWARD = _library.register(
    "pathway_loss_backward(Tensor[] students, Tensor[] teachers, Tensor weights, Tensor means, Tensor grad_loss,"
    " Tensor grad_per_pathway, str distance) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    students, teachers, weights, ctx.distance, ctx.keep_means = inputs
    ctx.formats = [memory_format(s) for s in students]
    ctx.set_materialize_grads(False)  # zeros for the means alone are 22 MB, for 27 pathways and a batch of 128
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(weights, *output[1:], *students, *teachers)


def _differentiate(
    ctx: Any, grad_loss: Tensor | None, grad_per_pathway: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    weights, per_pathway, means, *maps = ctx.saved_tensors
    middle = len(maps) // 2
    # the means are in the maps' memory order, which a hook that offloads saved tensors may have changed
    students = [s.contiguous(memory_format=f) for s, f in zip(maps[:middle], ctx.formats, strict=True)]
    teachers = maps[middle:]
    nothing = [None] * middle
    gradients: Any = nothing
    grad_loss = weights.new_zeros(()) if grad_loss is None else grad_loss
    grad_per_pathway = torch.zeros_like(weights) if grad_per_pathway is None else grad_per_pathway
    if ctx.keep_means:
        gradients = torch.ops.distpro.pathway_loss_backward(
            students, teachers, weights, means, grad_loss, grad_per_pathway, ctx.distance
        )
    elif any(s.requires_grad for s in students):
        raise RuntimeError("pathway_loss was run without keep_means: it has no gradient for the students")
    of_weights = grad_loss * per_pathway if weights.requires_grad else None
    return gradients, nothing, of_weights, None, None


_library.register_autograd(_FORWARD, _differentiate, _save)
_library.refuse_backward(_BACKWARD, "pathway_loss has no second derivatives")
