"""ReviewKD: deep student features review the teacher's shallow ones (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distpro.errors import UserError
from distpro.features import Features, Output, Teacher
from distpro.methods.base import Method, Moment
from distpro.ops import pathway_loss
from distpro.process import WARM_UP, warmed
from distpro.transforms import Resize, Shape, Size


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of one student stage with the fused map of the deeper stages."""

    def __init__(self, student: Shape, teacher: Shape, mid: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(student[0], mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        self.resize = Resize(teacher[1:])
        self.expand = nn.Sequential(nn.Conv2d(mid, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0]))
        for part in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(next(part.parameters()), a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: Size) -> tuple[Tensor, Tensor]:
        """`(map [H, W] = size with the teacher's channels, fused map for the next shallower stage)`."""
        x = self.reduce(x)
        if self.attention is not None and deeper is not None:
            deeper = self.resize(deeper, x.shape[2:])
            share = self.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * share[:, :1] + deeper * share[:, 1:]
        x = self.resize(x, size)
        return self.expand(x), x


class ReviewKD(Method):
    """CE + kd_weight * warm-up * sum over stages, including the pooled feature, of HCL(ABF(student), teacher).

    The authors' kd_weight is 0.6 to 8, depending on the pair; stages are compared one to one. Features are pre-ReLU
    on both sides, as in the authors' ImageNet code. Their CIFAR code reads students after the ReLU, and WRNs before the
    BN, without a measurable difference (RESULTS.md).
    """

    pooled = True
    options = ("kd_weight", "warm_up")

    def __init__(self, student: Features, teacher: Teacher, kd_weight: float = 1.0, warm_up: float = WARM_UP) -> None:
        super().__init__(student, teacher)
        if len(student.shapes) != len(teacher.shapes):
            raise UserError(
                f"reviewkd compares stage with stage: the teacher has {len(teacher.shapes)}, the student "
                f"{len(student.shapes)}; name as many with --teacher-layers and --student-layers"
            )
        self.kd_weight, self.warm_up = kd_weight, warm_up
        deepest = len(student.shapes) - 1
        mid = min(512, student.shapes[-1][0])
        self.fusions = nn.ModuleList(
            Fusion(s, t, mid, i == deepest) for i, (s, t) in enumerate(zip(student.shapes, teacher.shapes, strict=True))
        )

    def moment(self, progress: float) -> Moment:
        return Moment(torch.full((len(self.fusions),), self.kd_weight * warmed(progress, self.warm_up)))

    @property
    def steady(self) -> bool:
        return not self.warm_up

    def parts(self) -> Iterable[nn.Module]:
        return self.fusions

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        assert teacher is not None
        reviewed: list[Tensor] = []
        rest = None
        deep_first = zip(reversed(self.fusions), reversed(student.maps), reversed(teacher.maps), strict=True)
        for fusion, x, taught in deep_first:
            y, rest = fusion(x, rest, taught.shape[2:])
            reviewed.insert(0, y)
        loss, _ = pathway_loss(reviewed, teacher.maps, moment.weights, "hcl")
        return {"reviewkd": loss}
