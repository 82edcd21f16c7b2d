"""What tests/test_parallel.py runs in one process and in two: a few steps in float64, and what they leave in a file."""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from distpro import UserError, distill, parallel
from distpro.data import create_dataset
from distpro.distance_search import distances
from distpro.distillation import DistillStep
from distpro.distiller import Distiller
from distpro.loop import fit
from distpro.models import create_model
from distpro.pathways import all_pathways
from distpro.process import Process
from distpro.recipe import Recipe
from distpro.search_step import SearchStep
from distpro.tasks import Classification

IMAGE, RECIPE, BATCH = (1, 8, 8), Recipe(1, lr=0.05), 32


class Doubles:
    """This process's share of a data set's batches, in float64."""

    def __init__(self, split, rows, augment):
        loader = split.subset(range(rows)).loader(BATCH // parallel.world_size(), shuffle=True, augment=augment, seed=3)
        self.loader = loader.shard(parallel.rank(), parallel.world_size())

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((x.double(), y) for x, y in self.loader)


def pair():
    torch.manual_seed(0)
    return create_model("wrn_10_1", 10, 1).double(), create_model("resnet8", 10, 1).double()


def left_by(step, modules, others=()):
    values = {f"{i}.{k}": v for i, module in enumerate(modules) for k, v in module.state_dict().items()}
    train = Doubles(create_dataset("digits").train, 4 * BATCH, True)
    history = fit(step, train, RECIPE.scheduler(step.optimizer, len(train)), 1)
    metrics = Classification().evaluate(modules[0], Doubles(create_dataset("digits").test, 5 * BATCH - 3, False))
    told = torch.tensor([history[0]["train_loss"], *metrics], dtype=torch.float64)
    return values | {"told": told} | dict(others)


def searched(hypergradient):
    student, teacher = pair()
    distiller = Distiller(student, teacher, image=IMAGE, transforms="AE", warm_up=0.0, sync_bn=True).train()
    optimizer = RECIPE.optimizer(distiller.trainable_parameters())
    judges = Doubles(create_dataset("digits").test, 4 * BATCH, False)
    step = SearchStep(distiller, optimizer, judges, steps=4, hypergradient=hypergradient, radius=1e-5)
    return left_by(step, [student, step.pathways], {"z": step.z, "record": step.z_record})


def distilled(method):
    student, teacher = pair()
    distiller = Distiller(student, teacher, image=IMAGE, method=method, sync_bn=True).double().train()
    step = DistillStep(distiller, Recipe(1, lr=0.05, ema=0.9))
    return left_by(step, [student, distiller.method, step.average])


def compared():
    distiller = Distiller(*pair(), image=IMAGE, transforms="AE")
    return {"distances": distances(distiller, Doubles(create_dataset("digits").test, 5 * BATCH - 3, False))}


def wrapped(ddp):
    """What is left by torch's DistributedDataParallel around a distiller that drops pathways, or by the step here."""
    student, teacher = pair()
    paths = all_pathways(3, 3, "A")
    z = torch.stack([torch.tensor([float(p.teacher <= 1) for p in paths]), torch.zeros(9), torch.ones(9)])
    options = {"transforms": "A", "process": Process(z, paths), "steps": 5, "warm_up": 0.0}
    distiller = Distiller(student, teacher, image=IMAGE, **options).train()
    step = DistillStep(distiller, RECIPE)
    module = DistributedDataParallel(distiller, find_unused_parameters=True) if ddp else None
    for k, (x, y) in enumerate(Doubles(create_dataset("digits").train, 5 * BATCH, True)):
        if module is None:
            step(x, y, k / 4)
        else:
            step.optimizer.zero_grad()
            module(x, y)["loss"].backward()
            step.optimizer.step()
    return {f"{k}": p.detach() for k, p in enumerate(distiller.trainable_parameters())}


def of_its_own():
    """What a job says whose processes begin with networks of their own."""
    torch.manual_seed(parallel.rank())
    try:
        distill(
            create_model("wrn_10_1", 10, 1),
            None,
            [(torch.randn(2, *IMAGE), torch.ones(2).long())],
            RECIPE,
            method="none",
        )
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    parallel.begin(torch.device("cpu"))
    results = {name: searched(name) for name in ("exact", "finite-difference")}
    results |= {name: distilled(name) for name in ("none", "distpro", "reviewkd")}
    results["distances"] = compared()
    if parallel.world_size() > 1:
        results |= {"ddp": wrapped(True), "step": wrapped(False), "of its own": of_its_own()}
    torch.save(results, sys.argv[1] + str(parallel.rank()))
    parallel.end()
