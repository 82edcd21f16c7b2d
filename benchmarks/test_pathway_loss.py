"""pathway_loss at real sizes against eager PyTorch and torch.compile of the same formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distpro.ops import pathway_dots, pathway_loss, reference

# (pathways to a teacher's map, its shape [C, H, W])
SIZES = {
    "cifar": [(9, (32, 32, 32)), (9, (64, 16, 16)), (9, (128, 8, 8))],  # WRN-40-2 -> WRN-16-2
    "imagenet": [  # ResNet50 -> MobileNetV1
        *((5, (256, 56, 56)), (4, (512, 28, 28)), (3, (1024, 14, 14))),
        *((2, (2048, 7, 7)), (1, (2048, 1, 1))),
    ],
}
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 2e-2)}  # relative errors of losses and of gradients


def formula(students: list[torch.Tensor], teachers: list[torch.Tensor], weights: torch.Tensor) -> Any:
    """What one would write in PyTorch, and what torch.compile gets."""
    losses = [reference.hcl((s - t).to(weights.dtype)) for s, t in zip(students, teachers, strict=True)]
    per_pathway = torch.stack(losses)
    return (weights * per_pathway).sum(), per_pathway


def published(students: list[torch.Tensor], teachers: list[torch.Tensor], weights: torch.Tensor) -> Any:
    """The loss as in the code of ReviewKD and DistPro: both maps are pooled, level by level."""

    def hcl(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        loss, weight, weights = F.mse_loss(s, t), 1.0, 1.0
        for level in (4, 2, 1):
            if level < s.shape[2]:
                weight /= 2
                weights += weight
                pooled = (F.adaptive_avg_pool2d(x, (level, level)) for x in (s, t))
                loss = loss + weight * F.mse_loss(*pooled)
        return loss / weights

    per_pathway = torch.stack([hcl(s, t).to(weights.dtype) for s, t in zip(students, teachers, strict=True)])
    return (weights * per_pathway).sum(), per_pathway


def make(size: str, dtype: torch.dtype, last: bool, request: pytest.FixtureRequest, device: torch.device) -> Any:
    batch = request.config.getoption(f"--{size}-batch")
    torch.manual_seed(0)
    students, teachers = [], []
    for pathways, shape in SIZES[size]:
        order = torch.channels_last if last else torch.contiguous_format
        maps = [torch.randn(batch, *shape, device=device).to(dtype).contiguous(memory_format=order)]
        maps += [torch.randn_like(maps[0]) for _ in range(pathways)]
        teachers += [maps[0]] * pathways
        students += [m.requires_grad_() for m in maps[1:]]
    weights = torch.rand(len(students), device=device)
    shapes = [f"{pathways} x {[batch, *shape]}" for pathways, shape in SIZES[size]]
    return students, teachers, weights, shapes


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32-nchw", "bf16-nhwc"]
)
@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("size", SIZES)
def test_pathway_loss(compare_ops, request, device, size, train, dtype, last):
    students, teachers, weights, shapes = make(size, dtype, last, request, device)

    def with_formula(function: Any) -> Any:
        def run() -> Any:
            if not train:
                with torch.no_grad():
                    return function(students, teachers, weights)
            loss, per_pathway = function(students, teachers, weights)
            return loss, per_pathway, *torch.autograd.grad(loss, students)

        return run

    contenders = {"native": with_formula(pathway_loss), "eager": with_formula(formula)}
    contenders["published"] = with_formula(published)
    # Compiling takes a minute on a small CPU: only for the numbers that are quoted.
    if not request.config.getoption("--no-compile") and dtype == torch.float32 and not last:
        torch.compiler.reset()
        contenders["compile"] = with_formula(torch.compile(formula, dynamic=False, fullgraph=True))
    wide = [s.detach().double().requires_grad_() for s in students]
    loss, per_pathway = formula(wide, [t.double() for t in teachers], weights.double())
    wanted = loss, per_pathway, *(torch.autograd.grad(loss, wide) if train else ())
    for k, (got, want) in enumerate(zip(contenders["native"](), wanted, strict=True)):
        assert relative(got, want) < BOUNDS[dtype][k > 1]
    del wide, wanted, loss, per_pathway

    elements = sum(s.numel() for s in students)
    compare_ops(contenders, elements * dtype.itemsize * (5 if train else 2), shapes)


def test_pathway_dots(compare_ops, request, device):
    students, teachers, _, shapes = make("cifar", torch.float32, False, request, device)
    left = [s.detach() for s in students]
    contenders = {
        "native": lambda: pathway_dots(left, teachers),
        "eager": lambda: torch.stack([(a * b).sum() for a, b in zip(left, teachers, strict=True)]),
    }
    want = torch.stack([(a.double() * b.double()).sum() for a, b in zip(left, teachers, strict=True)])
    assert relative(contenders["native"](), want) < 1e-5
    compare_ops(contenders, sum(x.numel() for x in left) * 8, shapes)
