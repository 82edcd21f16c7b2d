"""The feature losses against an independent formula."""

import pytest
import torch
from oracle import hcl

from distpro.ops import pathway_loss

SIDES = (1, 2, 3, 4, 5, 7, 8, 14, 28, 32, 56)


@pytest.mark.parametrize("shape", [*((n, n) for n in SIDES), (7, 5), (3, 9), (14, 6), (9, 2), (2, 16), (5, 1)])
def test_hcl_value_and_gradient(shape):
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    student = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.7], dtype=torch.float64)
    loss, per_pathway = pathway_loss([student], [teacher], weights)
    expected = hcl(student, teacher)
    torch.testing.assert_close(per_pathway[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.7 * expected, rtol=1e-12, atol=0)
    got, want = torch.autograd.grad(loss, student), torch.autograd.grad(0.7 * expected, student)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("distance", ["hcl", "l2", "l1"])
def test_weighted_sum_and_gradcheck(distance):
    torch.manual_seed(0)
    students = [torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    teachers = [torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3)]
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    loss, per_pathway = pathway_loss(students, teachers, weights, distance)
    torch.testing.assert_close(loss, (weights * per_pathway).sum())
    assert torch.autograd.gradcheck(lambda w, *s: pathway_loss(s, teachers, w, distance), (weights, *students))


def test_plain_distances_and_tokens():
    torch.manual_seed(1)
    s, t = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    one = torch.ones(1)
    assert pathway_loss([s], [t], one, "l2")[0].item() == pytest.approx(((s - t) ** 2).sum().item() / 72, rel=1e-6)
    assert pathway_loss([s], [t], one, "l1")[0].item() == pytest.approx((s - t).abs().sum().item() / 72, rel=1e-6)


def test_no_pathway_is_no_loss():
    loss, per_pathway = pathway_loss([], [], torch.ones(0))
    assert loss.item() == 0
    assert per_pathway.shape == (0,)
