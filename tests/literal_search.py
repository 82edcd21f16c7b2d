"""One search step as Eq. 4 and 5 are printed, in plain PyTorch: what the search step is compared with.

No straw man: the teacher runs once and without gradients, one train pass serves theta and z, the two perturbed passes
record no graph. Independent of `distpro.search_step` and `distpro.hypergradient`; tests and benchmarks share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.features import Features, Teacher
from distpro.ops.reference import DISTANCES
from distpro.pathways import Pathways


class LiteralSearch:
    """`step(x, y)` moves the student by SGD and z `[P]` by Adam, along the finite difference of Eq. 5."""

    def __init__(
        self,
        student: Features,
        teacher: Teacher,
        pathways: Pathways,
        optimizer: torch.optim.Optimizer,
        validation: tuple[Tensor, Tensor],
        kd_weight: float = 1.0,
        alpha_lr: float = 0.05,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        self.student, self.teacher, self.pathways, self.optimizer = student, teacher, pathways, optimizer
        self.validation = validation
        self.scale = len(pathways) * kd_weight
        self.theta = [p for p in student.parameters() if p.requires_grad]
        self.z = torch.ones(len(pathways), dtype=self.theta[0].dtype, device=self.theta[0].device)
        self.z.requires_grad_()
        self.adam = torch.optim.Adam([self.z], lr=alpha_lr, betas=betas)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        before = [p.detach().clone() for p in self.theta]
        blocks = [p.detach().clone() for p in self.pathways.parameters()]
        targets = self.teacher(x).maps
        output = self.student(x)
        weights = torch.cat([self.z.detach(), self.z.new_ones(1)]).softmax(0)[:-1]
        loss = F.cross_entropy(output.logits, y) + self.scale * (weights * self._losses(output.maps, targets)).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        buffers = [*self.student.buffers(), *self.pathways.buffers()]
        kept = [b.clone() for b in buffers]
        x_val, y_val = self.validation
        F.cross_entropy(self.student(x_val).logits, y_val).backward()
        v = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.theta]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            after = [p.detach().clone() for p in self.theta]
            phi = [p.detach().clone() for p in self.pathways.parameters()]
            epsilon = 0.01 / torch.cat([g.flatten() for g in v]).norm()
            for p, value in zip(self.pathways.parameters(), blocks, strict=True):
                p.copy_(value)
            sides = []
            for sign in (1, -1):
                for p, value, g in zip(self.theta, before, v, strict=True):
                    p.copy_(value + sign * epsilon * g)
                sides.append(self._losses(self.student(x).maps, targets))
            h = (sides[0] - sides[1]) / (2 * epsilon)
            for p, value in zip([*self.theta, *self.pathways.parameters()], [*after, *phi], strict=True):
                p.copy_(value)
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        self.z.grad = -self.scale * weights * (h - (weights * h).sum())
        self.adam.step()
        return loss.detach()

    def _losses(self, maps: list[Tensor], targets: list[Tensor]) -> Tensor:
        distance = DISTANCES[self.pathways.distance]
        return torch.stack(
            [
                distance(self.pathways.blocks[p.name](maps[p.student - 1]) - targets[p.teacher - 1])
                for p in self.pathways.pathways
            ]
        )
