"""perturb at the size of a CIFAR student and of a ResNet-18, against foreach and a plain loop in PyTorch."""

from __future__ import annotations

import pytest
import torch

from distpro.models import create_model
from distpro.ops import perturb, reference

RADIUS = 0.01


def foreach(parameters, direction):
    norm = torch.stack(torch._foreach_norm(direction)).norm()
    steps = torch._foreach_mul(direction, RADIUS / norm)
    return torch._foreach_add(parameters, steps), torch._foreach_sub(parameters, steps)


def shapes_of(name: str) -> list[torch.Size]:
    if name == "wrn_16_2":
        return [p.shape for p in create_model("wrn_16_2", 100, 3).parameters()]
    import timm

    with torch.device("meta"):
        return [p.shape for p in timm.create_model("resnet18").parameters()]


@pytest.mark.parametrize("model", ["wrn_16_2", "resnet18"])
def test_perturb(compare_ops, device, model):
    torch.manual_seed(0)
    parameters = [torch.randn(shape, device=device) for shape in shapes_of(model)]
    direction = [torch.randn_like(p) for p in parameters]
    contenders = {
        "native": lambda: perturb(parameters, direction, RADIUS),
        "foreach": lambda: foreach(parameters, direction),
        "eager": lambda: reference.perturb(parameters, direction, RADIUS),
    }
    for got, want in zip(contenders["native"](), contenders["eager"](), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    elements = sum(p.numel() for p in parameters)
    compare_ops(contenders, 5 * 4 * elements, f"{len(parameters)} tensors, {elements} numbers")
