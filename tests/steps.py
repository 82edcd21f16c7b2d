"""Steps of small networks, for the tests of graphs and of what runs on which device."""

import torch

from distpro import Distiller, Recipe
from distpro.distill import DistillStep
from distpro.features import Features, Teacher
from distpro.models import create_model
from distpro.pathways import Pathways, all_pathways
from distpro.search_step import SearchStep

IMAGE, STEPS = (1, 8, 8), 24
LOGITS = ["KD", "DKD", "DIST", "LSKD"]
RECIPE = Recipe(epochs=2, lr=0.05)  # cosine: the rate is another one at every step


def batches(device, count=STEPS // 2, seed=0, size=8):
    torch.manual_seed(seed)
    made = [(torch.randn(size, *IMAGE).double(), torch.randint(10, (size,))) for _ in range(count)]
    return [(x.to(device), y.to(device)) for x, y in made]


def pair(device, student="wrn_10_1"):
    torch.manual_seed(0)
    made = create_model(student, 10, 1), create_model("resnet8", 10, 1)
    return [network.double().to(device) for network in made]


def distill_step(device, method, recipe=RECIPE, **options):
    distiller = Distiller(*pair(device), image=IMAGE, method=method, **options).double().train()
    return DistillStep(distiller, recipe)


def search_step(device, student=None, **options):
    ours, teacher = pair(device)
    reader, frozen = Features(student or ours, IMAGE).train(), Teacher(teacher, IMAGE)
    torch.manual_seed(1)
    blocks = Pathways(all_pathways(3, 3, "AB"), reader.shapes, frozen.shapes).double().to(device)
    optimizer = RECIPE.optimizer([*reader.parameters(), *blocks.parameters()])
    judges = batches(device, 3, 9)
    step = SearchStep(reader, frozen, blocks, optimizer, judges, steps=STEPS, warm_up=0.3, kd_weight=2.0, **options)
    step.adam.param_groups[0]["capturable"] = True
    return step
