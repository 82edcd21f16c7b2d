"""What a step does after its plan is the work of the device alone: `meta` stands in for a GPU.

A tensor made or read on the host is a wait for the GPU, and an error in a CUDA graph. On `meta` a value cannot be read
at all, and an operator that meets a tensor on the CPU is noted here.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from steps import LOGITS, STEPS, batches, distill_step, search_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distpro import Recipe
from distpro.data.resident import Augmentation, Resident
from distpro.graphs import _Capturing
from distpro.methods import METHODS
from distpro.planned_step import Graphed
from distpro.precision import Precision

META = torch.device("meta")


class OnTheHost(TorchDispatchMode):
    """The operators that read or made a tensor on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.device != META for t in tree_leaves((args, kwargs, result))):
            self.found.append(str(function))
        return result


@pytest.fixture(autouse=True)
def gpu_like(monkeypatch):
    """What torch has for GPUs and not for `meta`."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu" if device == META else device))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda **_: ["meta"])


def on_the_host(step, calls=3):
    """Of some steps as a graph holds them, rates on the device."""
    graphed = Graphed(step, backend=None)
    host = OnTheHost()
    for (x, y), progress in zip(batches(META, calls), torch.linspace(0, 1, calls).tolist(), strict=True):
        plan = step.plan(progress)
        numbers = torch.cat([torch.tensor([0.05]), plan.numbers]).to(META)
        with _Capturing(), host:
            losses = graphed._take(plan.key, x, y, numbers, *plan.batches)
            step.after()
        assert {value.device for value in losses.values()} == {META}
    return host.found


@pytest.mark.parametrize("precision", [Precision(), Precision(None, True, torch.float64)], ids=["plain", "folded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_distillation(method, precision):
    options = {"transforms": "AE", "logit_pathways": LOGITS} if method == "distpro" else {}
    recipe = Recipe(epochs=2, lr=0.05, ema=0.9, label_smoothing=0.1, grad_accum_steps=2)
    assert on_the_host(distill_step(META, method, recipe, precision=precision, **options)) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_first": True}, {"hypergradient": "finite-difference"}, {"precision": Precision(None, True)}],
    ids=["exact", "alpha-first", "finite-difference", "channels-last"],
)
def test_a_search(options):
    assert on_the_host(search_step(META, **options)) == []


def test_batches_of_a_loader_on_the_host_are_moved():
    (x, y), *_ = batches(torch.device("cpu"), 1)
    for step in (distill_step(META, "kd"), search_step(META)):
        assert step(x, y, 0.0)["loss"].device == META


def test_a_batch_of_images():
    images = torch.zeros(STEPS, 1, 8, 8, dtype=torch.uint8, device=META)
    augmentation = Augmentation((0.5,), (0.5,), padding=2, flip=True, image_size=12)
    loader = Resident.of(images, torch.zeros(STEPS, dtype=torch.int64), augmentation, META).loader(
        8, shuffle=True, augment=True, drop_last=True
    )
    draws = torch.zeros(4, 8, dtype=torch.int64, device=META)
    with OnTheHost() as host:
        x, y = loader._batch((), draws)
    assert (x.shape, y.shape, host.found) == ((8, 1, 12, 12), (8,), [])


def test_that_a_look_from_the_host_is_seen():
    x = torch.zeros(3, device=META)
    with OnTheHost() as host:
        x * torch.tensor(2.0)
    assert "aten.mul.Tensor" in host.found
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
