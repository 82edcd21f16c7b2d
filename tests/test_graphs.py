"""Steps replayed as CUDA graphs. Without a GPU the graphs are tapes (tests/tape.py); with one they are real as well."""

import copy
import sys

import pytest
import torch
from steps import LOGITS, RECIPE, STEPS, batches, distill_step, pair, search_step
from tape import Tape
from torch import nn

from distpro import Process, Recipe, UserError, distill
from distpro.data import create_dataset
from distpro.graphs import WARM_UPS, CudaGraphs
from distpro.loop import Observer, fit
from distpro.methods.none import NoDistillation
from distpro.pathways import all_pathways
from distpro.planned_step import Graphed, graphed
from distpro.sgd import SGD

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(params=["tape", GPU])
def backend(request, monkeypatch):
    if request.param == "cuda":
        return CudaGraphs(torch.device("cuda"))
    # Adam that counts its steps in a tensor is for GPUs only; a tape needs it, too.
    adam = sys.modules["torch.optim.adam"]  # torch.optim hides it
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    return Tape()


def trained(step, wrapped, train, recipe=RECIPE, said=None):
    """The state after training, and the losses. `said`: where reasons go; without it there must be none."""
    reasons = [] if said is None else said
    if isinstance(wrapped, Graphed):
        wrapped.say = reasons.append
    torch.manual_seed(5)
    before = copy.deepcopy(train)
    rows = fit(wrapped, train, recipe.scheduler(step.optimizer, len(train)), recipe.epochs)
    for (x, y), (x0, y0) in zip(train, before, strict=True):
        assert x.equal(x0), "a batch of the caller's was written to"
        assert y.equal(y0)
    assert said is not None or not reasons
    keys = ("train_loss", "train_task", "lr")
    return copy.deepcopy(wrapped.state_dict()), [[row[key] for key in keys] for row in rows]


def same(a, b):
    """Two state dicts, to what 24 steps make of the rounding of float64."""
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(t) for t in (a, b))
    assert len(flat_a) == len(flat_b)
    for x, y in zip(flat_a, flat_b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-10)
        else:
            assert x == pytest.approx(y)


def moving(count):
    """Drops the second half of the pathways at first and the first half later; for a while all count."""
    z = torch.ones(3, count)
    z[0, count // 2 :] = 0
    z[2, : count // 2] = 0
    return Process(z, all_pathways(3, 3, "A"))


@pytest.mark.parametrize(
    ("method", "options", "recipe"),
    [
        ("none", {}, RECIPE),
        ("kd", {}, RECIPE),
        ("reviewkd", {}, Recipe(epochs=2, lr=0.05, ema=0.9, label_smoothing=0.1, norm_decay=False)),
        ("distpro", {"transforms": "AE", "kd_weight": 0.5}, RECIPE),
        (
            "distpro",
            {"transforms": "A", "logit_pathways": LOGITS, "kd_weight": 0.5},
            Recipe(epochs=2, lr=0.05, grad_accum_steps=2),
        ),
    ],
    ids=["none", "kd", "reviewkd", "distpro", "logits"],
)
def test_a_distillation_is_the_same(backend, method, options, recipe):
    eager, ours = (distill_step(backend.device, method, recipe, **options) for _ in range(2))
    train = batches(backend.device)
    want, rows = trained(eager, eager, train, recipe)
    got, told = trained(ours, Graphed(ours, backend), train, recipe)
    same(got, want)
    same(told, rows)
    if isinstance(backend, Tape):
        assert (backend.warmed, backend.captures, backend.replays) == (WARM_UPS, 1, STEPS - WARM_UPS)


def test_a_graph_for_each_set_of_pathways(backend):
    process = moving(9)
    eager, ours = (distill_step(backend.device, "distpro", transforms="A", process=process) for _ in range(2))
    sets = {eager.plan(i / (STEPS - 1)).key for i in range(STEPS)}
    assert len(sets) == 3
    train = batches(backend.device)
    want, _ = trained(eager, eager, train)
    got, _ = trained(ours, Graphed(ours, backend), train)
    same(got, want)
    if isinstance(backend, Tape):
        assert backend.captures == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_every": 2}, {"alpha_first": True, "val_ema": 0.9}, {"literal_xi": True, "alpha_lr": 0.2}],
    ids=["plain", "every-2nd", "alpha-first-average", "literal"],
)
def test_a_search_is_the_same(backend, options):
    eager, ours = (search_step(backend.device, **options) for _ in range(2))
    train = batches(backend.device)
    want, rows = trained(eager, eager, train)
    got, told = trained(ours, Graphed(ours, backend), train)
    assert (ours.z - 1).abs().max() > 0.01, "z has to have moved for this to show anything"
    same(got, want)
    same(told, rows)
    if isinstance(backend, Tape):
        captures = 2 if "alpha_every" in options else 1
        assert (backend.captures, backend.replays) == (captures, STEPS - captures * WARM_UPS)


def test_a_capture_moves_nothing(backend):
    step = distill_step(backend.device, "distpro", transforms="A")
    wrapped, (x, y) = Graphed(step, backend), batches(backend.device, 1)[0]
    for _ in range(WARM_UPS):
        wrapped(x, y, 0.5)
    before = copy.deepcopy(step.state_dict())
    plan = step.plan(0.5)
    numbers = torch.cat([torch.tensor([0.05]), plan.numbers]).to(x.device)
    backend.capture(lambda: wrapped._take(plan.key, x, y, numbers))
    same(step.state_dict(), before)


def test_a_graph_goes_on_from_an_eager_state(backend):
    eager, ours = (distill_step(backend.device, "distpro", transforms="A") for _ in range(2))
    train = batches(backend.device)
    trained(eager, eager, train)
    ours.load_state_dict(copy.deepcopy(eager.state_dict()))
    want, _ = trained(eager, eager, train)
    got, _ = trained(ours, Graphed(ours, backend), train)
    same(got, want)


class Reads(NoDistillation):
    """A method that looks at a loss on the host."""

    def forward(self, student, teacher, target, moment):
        return {"extra": student.logits.square().mean() * (0.1 if student.logits.sum().item() > 0 else 0.2)}


def gives_up(eager, ours, backend):
    """The one reason for which `ours` runs without graphs, to the same numbers as `eager`."""
    said = []
    train = batches(backend.device)
    want, _ = trained(eager, eager, train)
    got, _ = trained(ours, Graphed(ours, backend), train, said=said)
    same(got, want)
    assert len(said) == 1
    return said[0]


def test_what_cannot_be_captured_runs_eagerly_and_says_why(backend):
    eager, ours = (distill_step(backend.device, "none") for _ in range(2))
    for step in (eager, ours):
        step.distiller.method = Reads(step.distiller.student, None)
    said = gives_up(eager, ours, backend)
    assert "without CUDA graphs" in said
    if isinstance(backend, Tape):
        assert "not permitted" in said


@pytest.mark.parametrize("case", ["dropout", "finite-difference"])
def test_a_search_that_draws_random_numbers_runs_eagerly(backend, case):
    def step():
        if case == "finite-difference":
            return search_step(backend.device, hypergradient=case)
        network = pair(backend.device)[0]
        network.fc = nn.Sequential(nn.Dropout(0.5), network.fc)
        return search_step(backend.device, network)

    eager, ours = step(), step()
    said = gives_up(eager, ours, backend)
    assert {"dropout": "dropout", "finite-difference": "finite-difference"}[case] in said


def test_batches_of_another_size_have_a_graph_of_their_own(backend):
    eager, ours = (distill_step(backend.device, "distpro", transforms="A") for _ in range(2))
    train = [*batches(backend.device, 5), *batches(backend.device, 5, 1, size=5)]
    want, _ = trained(eager, eager, train)
    got, _ = trained(ours, Graphed(ours, backend), train)
    same(got, want)


def test_a_rate_on_the_device_is_the_same_step():
    """Also where some have no momentum yet, and a gradient is missing."""

    def run(as_tensor):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(3)]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0, "nesterov": False}]
        optimizer = SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        for step in range(4):
            for i, p in enumerate(parameters):
                p.grad = None if (i, step) in ((1, 0), (0, 2)) else torch.randn_like(p)
            for group in optimizer.param_groups:
                lr = 0.1 / (step + 1)
                group["lr"] = torch.tensor(lr, dtype=torch.float64) if as_tensor else lr
            optimizer.step()
        return [p.detach() for p in parameters]

    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


def test_graphs_that_are_wanted_where_there_is_no_gpu():
    student, _ = pair("cpu")
    step = distill_step("cpu", "none")
    assert graphed(step, torch.device("cpu"), Observer()) is step
    with pytest.raises(UserError, match="CUDA graphs need a GPU, this job runs on cpu"):
        distill(student, None, batches("cpu", 2), RECIPE, method="none", cuda_graphs=True)


def test_images_that_grow_have_a_graph_a_size(backend):
    """As --size-schedule has it."""
    eager, ours = (distill_step(backend.device, "distpro", transforms="AE") for _ in range(2))
    train = [(nn.functional.interpolate(x, 8 if k < 6 else 12), y) for k, (x, y) in enumerate(batches(backend.device))]
    want, rows = trained(eager, eager, train)
    graphs = Graphed(ours, backend)
    got, told = trained(ours, graphs, train)
    same(got, want)
    same(told, rows)
    assert len(graphs.graphs.known) == 2
    assert all(captured.replay for captured in graphs.graphs.known.values())


def test_without_cuda_graphs_batches_are_made_without_them_too():
    for wanted, graphs in ((None, True), (True, True), (False, False)):
        assert create_dataset("digits", cuda_graphs=wanted).train.subset(torch.arange(9)).graphs is graphs
