"""DistPro: many pathways, weighted by a process. Uniform, final and searched weights all use this method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from distpro.features import Features, Output, Teacher, same_classes
from distpro.methods.base import Method, Moment
from distpro.pathways import Pathways, all_pathways
from distpro.process import WARM_UP, Process, warmed


class DistPro(Method):
    """CE + w(t) * sum_p a_p(t) * l_p (Eq. 2), with w = P * kd_weight after a warm-up and a(t) the process at time t.

    A pathway costs nothing while its weight is 0: its transform and loss are not run, nor are teacher stages beyond
    the last one needed; if all pathways are dropped, the teacher is not run at all. The transform of a dropped
    pathway gets no gradient, so that the optimizer leaves it and its momentum unchanged until it returns.
    """

    options = ("kd_weight", "process", "transforms", "pathways", "distance", "pooled", "logit_pathways", "warm_up")

    def __init__(
        self,
        student: Features,
        teacher: Teacher,
        process: Process | None = None,
        kd_weight: float = 1.0,
        transforms: Sequence[str] = "ABC",
        pathways: str = "all",
        distance: str = "hcl",
        pooled: bool = False,
        logit_pathways: Sequence[str] = (),
        warm_up: float = WARM_UP,
    ) -> None:
        super().__init__(student, teacher)
        if logit_pathways:
            same_classes(student, teacher, "a logit pathway")
        paths = all_pathways(len(teacher.shapes), len(student.shapes), transforms, pathways, logit_pathways)
        self.paths = Pathways(paths, student.shapes, teacher.shapes, distance)
        self.process = Process.uniform(paths) if process is None else process.reordered(paths)
        self.scale, self.warm_up = len(paths) * kd_weight, warm_up

    def moment(self, progress: float) -> Moment:
        weights = self.process.at(progress)  # on the CPU: which pathways are dropped is known without a sync
        active = tuple(weights.nonzero().flatten().tolist())
        depth: int | None = max((self.paths.pathways[i].teacher for i in active), default=0)
        if any(i >= self.paths.features for i in active):
            depth = None  # up to the logits
        scale = self.scale * warmed(progress, self.warm_up)
        return Moment(scale * weights[list(active)], depth, active)

    @property
    def steady(self) -> bool:
        return len(self.process) == 1 and not self.warm_up

    def parts(self) -> Iterable[nn.Module]:
        return self.paths.blocks.values()

    def forward(self, student: Output, teacher: Output | None, target: Tensor, moment: Moment) -> dict[str, Tensor]:
        if teacher is None:
            return {}
        starts = [student.logits, *student.maps]
        sources = [starts[p.student] for p in self.paths.pathways]
        loss, _ = self.paths(sources, teacher, target, moment.weights, moment.active)
        return {"pathways": loss}
