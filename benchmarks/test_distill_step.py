"""A distillation step of every method, in float32 and in bfloat16 with NHWC maps: what distillation costs."""

from __future__ import annotations

import pytest
import torch
from networks import IMAGE, MOMENTS, as_run, batch, dropping, pair

from distpro import Distiller, Process, Recipe, zoo
from distpro.distillation import DistillStep
from distpro.features import Teacher
from distpro.ops import reference
from distpro.precision import Precision

RECIPE = Recipe(epochs=1, lr=0.01)
BF16 = Precision(torch.bfloat16, channels_last=True, teacher=torch.bfloat16)
SEARCHED = "zoo:cifar100/wrn_16_2-wrn_16_1-trials"  # 4 of its 16 pathways are active
GOALS = {"dropping / kd": {"cpu": 1.4, "cuda": 1.3}, "dropping / reviewkd": 0.7, "float32 / bfloat16": {"cpu": 2.0}}


def step_of(method, device, precision, **options):
    student, teacher = pair(device)
    torch.manual_seed(1)
    needed = teacher if method != "none" else None
    distiller = Distiller(student, needed, image=IMAGE, method=method, precision=precision, **options).train()
    return DistillStep(distiller, RECIPE)


def referred(step):
    """The step with the pathway loss in plain PyTorch, as without the native layer."""

    def take(x, y, progress):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distpro.pathways.pathway_loss", reference.pathway_loss)
            return step(x, y, progress)

    return take


@pytest.mark.parametrize("precision", [Precision(), BF16], ids=["float32", "bfloat16"])
def test_distill_step(compare_steps, device, request, benchmark, precision):
    count = request.config.getoption("--cifar-batch")
    x, y = batch(count, device)
    process = dropping()
    assert process.dropped_fraction() == pytest.approx(0.6, abs=0.1)
    plain = {name: step_of(name, device, precision) for name in ("none", "kd", "reviewkd")}
    plain["uniform"] = step_of("distpro", device, precision)
    plain["float32 uniform"] = step_of("distpro", device, Precision())
    found = Process.load(zoo.find("process", SEARCHED))
    plain["searched"] = step_of("distpro", device, precision, process=found, transforms="E", pooled=True)
    plain["dropping"] = step_of("distpro", device, precision, process=process)
    last = plain["dropping"].distiller.method.moment(1.0)
    assert (last.depth, len(last.active)) == (3, 9)  # only the teacher's last stage, from all three student stages
    calls = {"dropping": [(x, y, moment) for moment in MOMENTS]}
    made = {name: as_run(step, device, *calls.get(name, [(x, y, 0.5)])) for name, step in plain.items()}
    if device.type == "cuda":
        made["uniform without graphs"] = step_of("distpro", device, precision)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "ahead", lambda self, x, depth=None: lambda: self(x, depth))
            made["uniform, one stream"] = as_run(step_of("distpro", device, precision), device, (x, y, 0.5))
    made["uniform, plain operators"] = referred(step_of("distpro", device, precision))
    steps = {name: lambda step=step: step(x, y, 0.5) for name, step in made.items() if name != "dropping"}
    for moment in MOMENTS:
        steps[f"dropping {moment:.2f}"] = lambda moment=moment: made["dropping"](x, y, moment)
    for name, step in made.items():  # at captured moments only: another one would evict a graph
        assert all(torch.isfinite(step(*arguments)["loss"]) for arguments in calls.get(name, [(x, y, 0.5)])), name

    ratio = compare_steps(steps, "dropping 0.33", batch=count, dropped=process.dropped_fraction(), goals=GOALS)
    ratios = {
        f"dropping / {other}": round(sum(s * ratio[f"dropping {at:.2f}"][other] for at, s in MOMENTS.items()), 4)
        for other in ("none", "kd", "reviewkd", "uniform")
    }
    ratios["uniform, plain operators / native"] = ratio["uniform, plain operators"]["uniform"]
    ratios |= {f"{name} / kd": ratio[name]["kd"] for name in ("uniform", "searched", "reviewkd")}
    ratios["searched / reviewkd"] = ratio["searched"]["reviewkd"]
    if device.type == "cuda":
        ratios["uniform, without graphs / with"] = ratio["uniform without graphs"]["uniform"]
        ratios["uniform, one stream / two"] = ratio["uniform, one stream"]["uniform"]
    ratios["float32 / this precision, uniform"] = ratio["float32 uniform"]["uniform"]
    benchmark.extra_info["ratios"] = ratios
    print("", ratios, benchmark.extra_info["milliseconds"], sep="\n")
