"""A search step against its train step alone and the literal search (Eq. 5), and each hypergradient's error."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from networks import IMAGE, PATHS, as_run, batch, pair

from distpro import Distiller, Recipe
from distpro.hypergradient import step_sizes
from distpro.precision import Precision
from distpro.search_step import SearchStep

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle
from literal_search import LiteralSearch

GOALS = {"cpu": {"exact / train": 1.35, "literal / exact": 1.6}, "cuda": {"exact / train": 1.5, "literal / exact": 5}}
RECIPE = Recipe(epochs=1, lr=0.01)
BF16 = Precision(torch.bfloat16, channels_last=True)
ERROR_BATCH = 8


def parts(device, dtype=torch.float32, precision=None):
    networks = (network.to(dtype) for network in pair(device))
    torch.manual_seed(1)
    distiller = Distiller(*networks, image=IMAGE, warm_up=0.0, precision=precision or Precision()).train()
    assert distiller.method.paths.pathways == PATHS
    return distiller, RECIPE.optimizer(distiller.trainable_parameters())


def step_of(device, validation, dtype=torch.float32, precision=None, **options):
    return SearchStep(*parts(device, dtype, precision), [validation], steps=10**4, **options)


def literal_of(device, validation):
    distiller, optimizer = parts(device)
    return LiteralSearch(distiller.student, distiller.teacher, distiller.method.paths, optimizer, validation)


def gradient(step, x, y):
    """d L_val / d z of one step: the amount by which plain SGD moves z."""
    step.adam = torch.optim.SGD([step.z], lr=1.0)
    before = step.z.clone()
    step(x, y, 0.0)
    return before - step.z


def errors(device):
    """Relative error of each hypergradient against double backward in float64.

    The student's step has lr 1e-4: with more, theta' itself, and so v, would differ between float32 and float64.
    """
    (x, y), validation = batch(ERROR_BATCH, device), batch(ERROR_BATCH, device, 1)

    def small(step):
        for group in step.optimizer.param_groups:
            group["lr"] = 1e-4
        return step

    x64, val64 = x.double(), (validation[0].double(), validation[1])
    step = small(step_of(device, val64, torch.float64))
    reference = step.student, step.teacher, step.pathways, step.optimizer
    truth = oracle.hypergradient(*reference, step.z, step.normalise, step.scale, (x64, y), val64)
    truth = truth / max(step_sizes(step.optimizer, step.theta))  # the step omits xi
    found = {}
    for name, options in {
        "exact": {},
        "finite-difference": {"hypergradient": "finite-difference"},
        "exact, bfloat16": {"precision": BF16},
    }.items():
        got = gradient(small(step_of(device, validation, **options)), x, y).double()
        found[name] = float((got - truth).norm() / truth.norm())
    return found


def test_search_step(compare_steps, device, request, benchmark):
    count = request.config.getoption("--cifar-batch")
    (x, y), validation = batch(count, device), batch(count, device, 1)
    train = step_of(device, validation, alpha_every=10**9)
    train(x, y, 0.0)  # the only step that moves its z
    call = (x, y, 0.0)
    train, exact = as_run(train, device, call), as_run(step_of(device, validation), device, call)
    averaged = as_run(step_of(device, validation, val_ema=0.98), device, call)
    difference = step_of(device, validation, hypergradient="finite-difference")
    fast = as_run(step_of(device, validation, precision=BF16), device, call)
    literal = literal_of(device, validation)
    steps = {
        "train": lambda: train(x, y, 0.0),
        "exact": lambda: exact(x, y, 0.0),
        "exact, averaged": lambda: averaged(x, y, 0.0),
        "finite-difference": lambda: difference(x, y, 0.0),
        "exact, bfloat16": lambda: fast(x, y, 0.0),
        "literal": lambda: literal(x, y),
    }
    pairs = [(name, "exact") for name in ("literal", "finite-difference", "exact, averaged")]
    pairs += [("exact", "train"), ("exact", "exact, bfloat16")]
    if device.type == "cuda":
        eager = step_of(device, validation)
        steps["exact, without graphs"] = lambda: eager(x, y, 0.0)
        pairs.append(("exact, without graphs", "exact"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the steps are timed as they are run, in TF32
        wrong = errors(device)
    ratio = compare_steps(steps, "exact", batch=count, relative_error=wrong, goals=GOALS[device.type])
    benchmark.extra_info["ratios"] = {f"{a} / {b}": ratio[a][b] for a, b in pairs}
    print("", benchmark.extra_info["ratios"], benchmark.extra_info["milliseconds"], wrong, sep="\n")
    assert wrong["exact"] < 1e-3
    assert wrong["finite-difference"] < 0.1
    assert wrong["exact, bfloat16"] < 0.5  # an untrained network on noise: worse than in any training
