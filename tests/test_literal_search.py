"""The literal step that benchmarks compare with is the search with Eq. 5's finite difference."""

import copy

import torch
from literal_search import LiteralSearch

from distpro import Distiller, Recipe
from distpro.models import create_model
from distpro.search_step import SearchStep

IMAGE = (3, 8, 8)


def test_it_moves_as_the_search_does():
    torch.manual_seed(0)
    student, teacher = create_model("wrn_10_1", 10).double(), create_model("resnet8", 10).double()
    distiller = Distiller(student, teacher, image=IMAGE, transforms="AB", warm_up=0.0).train()
    twin = copy.deepcopy(distiller)
    optimizers = [Recipe(epochs=1, lr=0.01).optimizer(d.trainable_parameters()) for d in (distiller, twin)]
    x, y = torch.randn(5, 8, *IMAGE, dtype=torch.float64), torch.randint(10, (5, 8))
    validation = [(x[4], y[4])]
    ours = SearchStep(distiller, optimizers[0], validation, steps=4, hypergradient="finite-difference")
    literal = LiteralSearch(twin.student, twin.teacher, twin.method.paths, optimizers[1], validation[0])
    for k in range(4):
        loss = ours(x[k], y[k], 0.0)["loss"]
        torch.testing.assert_close(literal(x[k], y[k]), loss, rtol=1e-9, atol=0)
    assert (ours.z - 1).abs().max() > 0.1
    torch.testing.assert_close(literal.z.detach(), ours.z, rtol=1e-5, atol=0)
    for a, b in zip(student.state_dict().values(), twin.student.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
