"""The pathways from a student's maps to a teacher's, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from distpro.errors import UserError, unknown
from distpro.features import Output
from distpro.logits import LOGIT_LOSSES
from distpro.ops import DISTANCES, pathway_loss
from distpro.transforms import TRANSFORMS, Shape, create_transform

DIRECTIONS: dict[str, Callable[[int, int], bool]] = {  # by teacher and student stage
    "all": lambda t, s: True,
    "review": lambda t, s: s >= t,
    "same": lambda t, s: s == t,
}


class Pathway(NamedTuple):
    """Student stage -> transform -> comparison with a teacher stage. Stages count from 1.

    To compare logits, both stages are 0 and `transform` is one of `LOGIT_LOSSES`.
    """

    teacher: int
    student: int
    transform: str

    @property
    def name(self) -> str:
        """A short name that does not depend on the networks: "t1-s2-A"."""
        return f"t{self.teacher}-s{self.student}-{self.transform}" if self.teacher else f"logits-{self.transform}"

    @classmethod
    def parse(cls, name: str) -> Pathway:
        """Return the pathway of a name such as "t1-s2-A" or "logits-KD"."""
        if name.startswith("logits-"):
            return cls(0, 0, name.removeprefix("logits-"))
        teacher, student, transform = name.split("-", 2)  # a user's own transform may contain hyphens
        return cls(int(teacher[1:]), int(student[1:]), transform)


def all_pathways(
    teacher_stages: int,
    student_stages: int,
    transforms: Sequence[str] = "ABC",
    direction: str = "all",
    logits: Sequence[str] = (),
) -> tuple[Pathway, ...]:
    """Combine every teacher stage, student stage and transform: 3 x 3 x 3 = the paper's 27 on CIFAR.

    `direction="review"` keeps student stages at least as deep as the teacher's (ReviewKD's finding): 5 x 5 maps and one
    transform give the paper's 15 on ImageNet. "same" keeps pairs of equal depth. `logits` adds a pathway between logits
    for each loss it names.
    """
    if direction not in DIRECTIONS:
        raise unknown("pathway direction", direction, DIRECTIONS)
    for kind in transforms:
        if kind not in TRANSFORMS:
            raise unknown("transform", kind, TRANSFORMS)
    for loss in logits:
        if loss not in LOGIT_LOSSES:
            raise unknown("logit pathway", loss, LOGIT_LOSSES)
    for what, named in (("transform", transforms), ("logit pathway", logits)):
        if len(set(named)) < len(named):
            raise UserError(f"a {what} is named twice: {' '.join(named)}")
    if not transforms and not logits:
        raise UserError(f"no transform and no logit pathway: expected transforms from {', '.join(TRANSFORMS)}")
    features = [
        Pathway(t, s, kind)
        for t in range(1, teacher_stages + 1)
        for s in range(1, student_stages + 1)
        for kind in transforms
        if DIRECTIONS[direction](t, s)
    ]
    return (*features, *(Pathway(0, 0, loss) for loss in logits))


class Pathways(nn.Module):
    """The transform blocks of a list of pathways, and the pathways' losses.

    `student` and `teacher` are the shapes `[C, H, W]` of the two networks' maps. The block of a pathway is
    `self.blocks[pathway.name]`; its parameters train along with the student. Pathways between logits have no block and
    come last.
    """

    def __init__(
        self,
        pathways: Sequence[Pathway],
        student: Sequence[Shape],
        teacher: Sequence[Shape],
        distance: str = "hcl",
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise unknown("distance", distance, DISTANCES)
        for p in pathways:
            if p.teacher > len(teacher) or p.student > len(student):
                raise UserError(
                    f"pathway {p.name} does not fit this pair: the teacher has {len(teacher)} stages, "
                    f"the student {len(student)}"
                )
        self.pathways = tuple(pathways)
        self.features = sum(p.teacher > 0 for p in pathways)
        self.distance = distance
        self.blocks = nn.ModuleDict(
            {
                p.name: create_transform(p.transform, student[p.student - 1], teacher[p.teacher - 1])
                for p in pathways[: self.features]
            }
        )

    def __len__(self) -> int:
        return len(self.pathways)

    def sources(self, student: Output) -> list[Tensor]:
        """Return for each pathway its own alias of the student's map (or logits) that it starts from.

        The gradient at an alias is that pathway's alone, before autograd sums over the pathways of a map: the left
        factor of the exact hypergradient (see `distpro.hypergradient`).
        """
        starts = [student.logits, *student.maps]
        return [starts[p.student].view_as(starts[p.student]) for p in self.pathways]

    def forward(
        self,
        sources: Sequence[Tensor],
        teacher: Output,
        target: Tensor,
        weights: Tensor,
        active: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `(loss, per_pathway)` from the sources (one per pathway), the teacher's output and the classes `[N]`.

        `active` lists the indices of the pathways in use, ascending (all by default); `weights` and `per_pathway` are
        those of the active ones. Blocks of other pathways are not called.
        """
        indices = range(len(self.pathways)) if active is None else active
        features = [(self.pathways[i], sources[i]) for i in indices if i < self.features]
        logits = [(self.pathways[i], sources[i]) for i in indices if i >= self.features]
        losses = []
        loss = weights.new_zeros(())
        if features:
            teachers = [teacher.maps[p.teacher - 1] for p, _ in features]
            with record_function("transforms"):  # to the teacher's current size: images may grow during a training
                students = [
                    self.blocks[p.name](source, taught.shape[2:])
                    for (p, source), taught in zip(features, teachers, strict=True)
                ]
            loss, each = pathway_loss(students, teachers, weights[: len(features)], self.distance)
            losses.append(each)
        if logits:
            each = torch.stack([LOGIT_LOSSES[p.transform](source, teacher.logits, target) for p, source in logits])
            loss = loss + (weights[len(features) :] * each).sum()
            losses.append(each)
        return loss, torch.cat(losses)


def same_pathways(found: Sequence[Pathway], wanted: Sequence[Pathway], what: str) -> list[int]:
    """Return the index in `found` of each wanted pathway; raise a `UserError` that says how the sets differ, if so."""
    missing = [p.name for p in wanted if p not in found]
    surplus = [p.name for p in found if p not in wanted]
    if missing or surplus:
        parts = [f"lacks {', '.join(missing[:4])}" + ("…" if len(missing) > 4 else "")] if missing else []
        parts += [f"has {', '.join(surplus[:4])}" + ("…" if len(surplus) > 4 else "") + " besides"] if surplus else []
        raise UserError(
            f"{what} is for {len(found)} pathways ({_span(found)}), this pair has {len(wanted)} ({_span(wanted)}): "
            f"it {' and '.join(parts)}; search a process for this pair, or choose --transforms and stages that match"
        )
    return [list(found).index(p) for p in wanted]


def _span(pathways: Sequence[Pathway]) -> str:
    if not pathways:
        return "none"
    teachers, students = max(p.teacher for p in pathways), max(p.student for p in pathways)
    kinds = "".join(sorted({p.transform for p in pathways}))
    return f"teacher stages 1-{teachers}, student stages 1-{students}, transforms {kinds}"
