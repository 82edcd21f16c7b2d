"""The operators inside PyTorch: derivatives of every kind, the compiler, and the two lesser operators' numbers."""

from __future__ import annotations

import pytest
import torch
from test_native_ops import F32, F64, device, maps, poison, pytestmark, relative, results  # noqa: F401

from distpro.errors import UserError
from distpro.ops import pathway_dots, pathway_loss, perturb, reference

# -- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["hcl", "l2", "l1"])
def test_gradcheck(distance):
    students, teachers, weights = maps([(2, 2, 5, 4), (1, 3, 8, 2), (2, 2, 7, 7)], F64)
    assert torch.autograd.gradcheck(lambda w, *s: pathway_loss(s, teachers, w, distance), (weights, *students))


def test_gradient_of_one_input_alone():
    students, teachers, weights = maps([(2, 3, 8, 8)] * 2, F64)
    (only,) = torch.autograd.grad(pathway_loss(students, teachers, weights.detach())[0], students[:1])
    (want,) = torch.autograd.grad(reference.pathway_loss(students, teachers, weights)[0], students[:1])
    torch.testing.assert_close(only, want)
    fixed = [s.detach() for s in students]
    (only,) = torch.autograd.grad(pathway_loss(fixed, teachers, weights)[0], weights)
    torch.testing.assert_close(only, reference.pathway_loss(fixed, teachers, weights)[1])
    with torch.no_grad():
        assert not pathway_loss(students, teachers, weights)[0].requires_grad


def test_saved_maps_may_come_back_in_another_layout():
    """As from torch.autograd.graph.save_on_cpu, which keeps no strides."""
    students, teachers, weights = maps([(2, 24, 7, 7)], F64)
    nhwc = [s.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for s in students]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: torch.empty(x.shape, dtype=F64).copy_(x), lambda x: x):
        loss = pathway_loss(nhwc, teachers, weights)[0]
    (got,) = torch.autograd.grad(loss, nhwc)
    (want,) = torch.autograd.grad(reference.pathway_loss(students, teachers, weights)[0], students)
    torch.testing.assert_close(got, want)


def test_only_the_gradients_that_are_asked_for():
    students, teachers, weights = maps([(2, 3, 8, 8)] * 2, F64)
    for take in (lambda out: out[0], lambda out: out[1].sum()):
        got = torch.autograd.grad(take(pathway_loss(students, teachers, weights.detach())), students)
        want = torch.autograd.grad(take(reference.pathway_loss(students, teachers, weights.detach())), students)
        torch.testing.assert_close(got, want)


def test_second_derivatives_are_refused():
    students, teachers, weights = maps([(2, 3, 8, 8)])
    (gradient,) = torch.autograd.grad(pathway_loss(students, teachers, weights)[0], students, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_forward_mode_is_refused():
    students, teachers, weights = maps([(2, 3, 8, 8)])
    s, t = students[0].detach(), teachers[0]

    def loss(x, w):
        return pathway_loss([x], [t], w)[0]

    with torch.autograd.forward_ad.dual_level():
        for pair in ((torch.autograd.forward_ad.make_dual(s, t), weights), (s, dual_of(weights))):
            with pytest.raises(UserError, match="no forward-mode derivative"):
                loss(*pair)
        with pytest.raises(UserError, match="no forward-mode derivative"):
            pathway_dots([dual_of(s)], [t])
        with pytest.raises(UserError, match="no forward-mode derivative"):
            perturb([dual_of(s)], [t], 0.1)
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        with pytest.raises(UserError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x, f=function: f(x, weights.detach()), (s,), (t,))


def test_forward_mode_is_refused_by_the_operators_themselves():
    """Not only by the functions before them: torch.library's own autograd would give a tangent of zero."""
    (s,), (t,), weights = maps([(2, 3, 8, 8)])
    s, w, ops = s.detach(), weights.detach(), torch.ops.distpro
    means = ops.pathway_loss([s], [t], w, "hcl", True)[2]
    calls = [
        lambda x, y: ops.pathway_loss([x], [t], y, "hcl", False)[0],
        lambda x, y: ops.pathway_loss_backward([x], [t], y, means, y[0], y, "hcl")[0],
        lambda x, y: ops.pathway_dots([t], [x], [0], 1),
        lambda x, y: ops.perturb([t], [x], 0.1)[0][0],
    ]
    for call in calls:
        for x in (s, s.clone().requires_grad_()):
            with torch.autograd.forward_ad.dual_level():
                call(x, w)  # a constant
                with pytest.raises(UserError, match="no forward-mode derivative"):
                    call(dual_of(x), w)
        with pytest.raises(UserError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x, call=call: call(x, w), (s,), (t,))
    for call in calls[:2]:
        with pytest.raises(UserError, match="no forward-mode derivative"):
            torch.func.jvp(lambda y, call=call: call(s, y), (w,), (w,))


def dual_of(x):
    return torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))


# -- PyTorch's own checks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("distance", ["hcl", "l2"])
def test_opcheck(device, distance, last):  # noqa: F811
    students, teachers, weights = maps([(2, 3, 8, 8), (1, 2, 7, 5)], F32, device, last)
    torch.library.opcheck(
        torch.ops.distpro.pathway_loss.default, (students, teachers, weights, distance, True), atol=1e-6, rtol=1e-5
    )
    students, weights = [s.detach() for s in students], weights.detach()
    means = torch.ops.distpro.pathway_loss(students, teachers, weights, distance, True)[2]
    backward = (students, teachers, weights, means, weights[0] * 2, torch.ones_like(weights), distance)
    torch.library.opcheck(torch.ops.distpro.pathway_loss_backward.default, backward)
    torch.library.opcheck(torch.ops.distpro.pathway_dots.default, (students, teachers, [1, 0], 2))
    torch.library.opcheck(torch.ops.distpro.perturb.default, (students, teachers, 0.1))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(device, backend):  # noqa: F811
    torch.compiler.reset()
    students, teachers, weights = maps([(2, 3, 8, 8), (1, 2, 7, 5)], F32, device)

    def step(students, weights):
        loss, per_pathway = pathway_loss([s * 1.5 for s in students], teachers, weights)
        return loss + per_pathway.square().sum()

    want = torch.autograd.grad(step(students, weights), [*students, weights])
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(students, weights), [*students, weights])
    torch.testing.assert_close(got, want)


# -- the other operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16], ids=str)
def test_dots(device, dtype):  # noqa: F811
    left, right, _ = maps([(2, 3, 8, 8), (2, 3, 8, 8), (70001,), (1,)], dtype, device, shared=2)
    right[2], right[3] = left[2].detach(), left[3].detach()  # sums that do not cancel
    got = pathway_dots([x.detach() for x in left], right)
    want = torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)])
    assert got.dtype == reference.accumulation(dtype)
    assert relative(got, want) < 1e-6
    folded = pathway_dots([x.detach() for x in left], right, [2, 0, 2, 0])
    assert relative(folded, torch.stack([want[1] + want[3], want[0] * 0, want[0] + want[2]])) < 1e-6
    last = [x.to(memory_format=torch.channels_last) for x in right[:2]]
    assert relative(pathway_dots([x.detach() for x in left[:2]], last), want[:2]) < 1e-5


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_perturb(device, dtype):  # noqa: F811
    parameters, direction, _ = maps([(16, 3, 3, 3), (40000,), (), (5, 1)], dtype, device)
    parameters = [p.detach() for p in parameters]
    parameters[0] = parameters[0].to(memory_format=torch.channels_last)
    before = [p.clone() for p in parameters]
    plus, minus, epsilon = perturb(parameters, direction, 0.01)
    norm = torch.cat([d.flatten() for d in direction]).double().norm()
    assert relative(epsilon, 0.01 / norm) < 1e-6
    for p, old, d, up, down in zip(parameters, before, direction, plus, minus, strict=True):
        assert torch.equal(p, old)
        torch.testing.assert_close(up, p + epsilon * d, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(down, p - epsilon * d, rtol=1e-6, atol=1e-7)
        assert up.stride() == p.stride()


def test_tensors_of_no_elements(device):  # noqa: F811
    some, none = torch.randn(3, device=device), torch.randn(0, 2, device=device)
    for left in ([some, none], [none]):
        dots = pathway_dots(left, left, [1] * len(left))
        torch.testing.assert_close(dots, reference.pathway_dots(left, left, [1] * len(left), 2))
        plus, minus, epsilon = perturb(left, left, 0.1)
        want = reference.perturb(left, left, 0.1)
        for got, expected in zip((*plus, *minus, epsilon), (*want[0], *want[1], want[2]), strict=True):
            torch.testing.assert_close(got, expected)


def test_perturb_without_a_direction(device):  # noqa: F811
    parameters = [torch.randn(5, device=device), torch.randn(3, device=device)]
    for function in (perturb, reference.perturb):
        plus, minus, epsilon = function(parameters, [torch.zeros_like(p) for p in parameters], 0.01)
        assert epsilon == 0
        assert all(torch.equal(p, q) for p, q in zip([*parameters, *parameters], [*plus, *minus], strict=True))
        for wrong in (torch.inf, torch.nan):
            plus, minus, epsilon = function(parameters, [torch.full_like(p, wrong) for p in parameters], 0.01)
            assert epsilon.isnan()
            assert all(p.isnan().all() for p in (*plus, *minus))


def test_errors_of_the_other_operators():
    a, b = torch.randn(3), torch.randn(4)
    for arguments, message in [
        (([a], [b]), "pair 0 has shapes"),
        (([], []), "at least one pair"),
        (([a], [a, a]), "1 left sides, 2 right"),
        (([a], [a.double()]), "differs in dtype"),
        (([a.int()], [a.int()]), "no kernel for int32"),
    ]:
        with pytest.raises(UserError, match=message):
            pathway_dots(*arguments)
    for arguments, message in [
        (([a], [b], 0.1), "parameter 0 is"),
        (([], [], 0.1), "expected equal numbers, at least 1"),
        (([a.bfloat16()], [a.bfloat16()], 0.1), "no kernel for bfloat16: expected one of float32, float64"),
    ]:
        with pytest.raises(UserError, match=message):
            perturb(*arguments)
    a.requires_grad_()
    for result in (pathway_dots([a], [a.detach()]), perturb([a], [a.detach()], 0.1)[0][0]):
        with pytest.raises(RuntimeError, match="carries no gradient"):
            result.sum().backward()
