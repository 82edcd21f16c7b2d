"""The pair of the step benchmarks, from the paper's Table 1: WRN-40-2 -> WRN-16-2, 27 pathways, 32 x 32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distpro.graphs import WARM_UPS
from distpro.loop import Observer
from distpro.models import create_model
from distpro.pathways import Pathway, all_pathways
from distpro.planned_step import Graphed, graphed
from distpro.process import Process

IMAGE = (3, 32, 32)
CLASSES = 100
PATHS = all_pathways(3, 3, "ABC")


def pair(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """`(student, teacher)`, initialised from one seed."""
    torch.manual_seed(0)
    return create_model("wrn_16_2", CLASSES).to(device), create_model("wrn_40_2", CLASSES).to(device)


def batch(count: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *IMAGE, generator=generator)
    return x.to(device), torch.randint(CLASSES, (count,), generator=generator).to(device)


def dropping() -> Process:
    """A process that drops 60 % of the pathways, like the paper's (Fig. 6): low teacher stages first, high ones later.

    At each of four moments the pathways to one or two teacher stages are active: 1, then 1 and 2 through
    transforms A (linear) and B, then 2 and 3 likewise, then 3.
    """
    wanted = [{1: "ABC"}, {1: "AB", 2: "AB"}, {2: "AB", 3: "AB"}, {3: "ABC"}]

    def counts(p: Pathway, stages: dict[int, str]) -> float:
        return float(p.transform in stages.get(p.teacher, ""))

    return Process(torch.tensor([[counts(p, stages) for p in PATHS] for stages in wanted]), PATHS)


# The moments of the dropping process, and the share of the training that is nearest to each.
MOMENTS = {0.0: 1 / 6, 1 / 3: 1 / 3, 2 / 3: 1 / 3, 1.0: 1 / 6}


def as_run(step, device, *calls):
    """The step as training runs it: on a GPU with CUDA graphs, captured here by calls with these arguments."""
    said: list[str] = []
    observer = Observer()
    observer.note = said.append
    step = graphed(step, device, observer)
    for arguments in calls if device.type == "cuda" else ():
        for _ in range(WARM_UPS + 1):
            step(*arguments)
    if isinstance(step, Graphed):  # otherwise the timed step would not be a graph
        assert step.graphs is not None, said
        assert all(captured.replay for captured in step.graphs.known.values())
    return step
