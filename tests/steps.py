"""Steps of small networks, for the tests of graphs and of what runs on which device."""

import torch

from distpro import Distiller, Recipe
from distpro.distillation import DistillStep
from distpro.models import create_model
from distpro.precision import PLAIN
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


def search_step(device, student=None, precision=PLAIN, **options):
    ours, teacher = pair(device)
    torch.manual_seed(1)
    loss = {"transforms": "AB", "warm_up": 0.3, "kd_weight": 2.0}
    distiller = Distiller(student or ours, teacher, image=IMAGE, precision=precision, **loss).train()
    optimizer = RECIPE.optimizer(distiller.trainable_parameters())
    step = SearchStep(distiller, optimizer, batches(device, 3, 9), steps=STEPS, **options)
    step.adam.param_groups[0]["capturable"] = True
    return step
