"""What each method adds to the loss, and what a dropped pathway costs: nothing."""

import itertools
import runpy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import hcl
from torch import nn

from distpro import Distiller, Process, Recipe, distill
from distpro.distillation import DistillStep
from distpro.errors import UserError
from distpro.methods import METHODS
from distpro.methods.reviewkd import WARM_UP
from distpro.models import create_model
from distpro.pathways import all_pathways

IMAGE = (3, 16, 16)


def pair(method="distpro", **options):
    torch.manual_seed(0)
    distiller = Distiller(
        create_model("wrn_10_1", 10), create_model("resnet8", 10), image=IMAGE, method=method, **options
    )
    return distiller.train(), torch.randn(4, *IMAGE), torch.randint(10, (4,))


@pytest.mark.parametrize("method", METHODS)
def test_terms_add_up_and_train_the_student_alone(method):
    distiller, x, y = pair(method)
    losses = distiller(x, y, progress=0.5)
    terms = sum(v for k, v in losses.items() if k not in ("loss", "task"))
    torch.testing.assert_close(losses["loss"], distiller.method.task_weight * losses["task"] + terms)
    losses["loss"].backward()
    assert all(p.grad is not None for p in distiller.trainable_parameters())
    if distiller.teacher is not None:
        assert all(p.grad is None for p in distiller.teacher.parameters())


def test_kd_is_the_formula():
    distiller, x, y = pair("kd", temperature=4.0)
    losses = distiller(x, y)  # it wants the same at every moment, so nobody has to say which
    s, t = distiller.student(x).logits / 4, distiller.teacher(x).logits / 4
    p = t.softmax(1)
    want = 0.9 * 16 * (p * (p.log() - s.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(losses["kd"], want)
    torch.testing.assert_close(losses["loss"], 0.1 * losses["task"] + want)
    other, x, y = pair("kd", task_loss_weight=0.5, distill_loss_weight=0.5, temperature=1.0)
    halves = other(x, y)
    p, log = other.teacher(x).logits.softmax(1), other.student(x).logits.log_softmax(1)
    torch.testing.assert_close(halves["loss"], 0.5 * halves["task"] + 0.5 * (p * (p.log() - log)).sum(1).mean())


def test_reviewkd_warms_up_and_compares_every_stage():
    distiller, x, y = pair("reviewkd", kd_weight=2.0)
    assert distiller.student.shapes[-1][1:] == (1, 1)  # the pooled feature too
    assert distiller(x, y, progress=0.0)["reviewkd"].item() == 0
    full = distiller(x, y, progress=1.0)["reviewkd"].item()
    assert distiller(x, y, progress=WARM_UP / 2)["reviewkd"].item() == pytest.approx(full / 2, rel=1e-5)
    # by hand, deep to shallow
    fusions, maps, targets = distiller.method.fusions, distiller.student(x).maps, distiller.teacher(x).maps
    total, rest = 0, None
    for i in range(len(maps) - 1, -1, -1):
        f = fusions[i]
        reduced = f.reduce(maps[i])
        if rest is not None:
            rest = F.interpolate(rest, maps[i].shape[2:], mode="nearest")
            z = torch.sigmoid(f.attention(torch.cat([reduced, rest], 1)))
            reduced = reduced * z[:, 0:1] + rest * z[:, 1:2]
        rest = F.interpolate(reduced, targets[i].shape[2:], mode="nearest")
        total += hcl(f.expand(rest), targets[i])
    assert full == pytest.approx(2 * total.item(), rel=1e-5)


def test_reviewkd_needs_as_many_stages():
    with pytest.raises(UserError, match="compares stage with stage"):
        Distiller(create_model("MobileNetV2", 10), create_model("resnet8", 10), image=(3, 32, 32), method="reviewkd")


def test_the_control_weighs_reviewkd_s_stages_as_a_process_does():
    control = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/reviewkd_weighted.py"))
    process = Process.keeping([3, 0], ["t1-s1-E", "t2-s1-E", "t1-s2-E", "t2-s2-E"], [0.25, 0.75])
    assert control["by_stage"](process).tolist() == [1.5, 0.5]
    weighted = control["WeightedReviewKD"]
    weighted.weights = torch.tensor([1.5, 0.5, 1.0, 1.0])
    distiller, *_ = pair(weighted, kd_weight=2.0)
    assert distiller.method.moment(1.0).weights.tolist() == [3.0, 1.0, 2.0, 2.0]


def test_uniform_distpro_is_the_mean_of_all_pathways():
    distiller, x, y = pair(kd_weight=0.7)
    got = distiller(x, y, progress=1.0)["pathways"]
    maps, targets = distiller.student(x).maps, distiller.teacher(x).maps
    paths = distiller.method.paths
    assert len(paths) == 27
    losses = [hcl(paths.blocks[p.name](maps[p.student - 1]), targets[p.teacher - 1]) for p in paths.pathways]
    torch.testing.assert_close(got, 0.7 * torch.stack(losses).sum())  # w / P = kd_weight


def calls_of(distiller):
    counts = dict.fromkeys(distiller.method.paths.blocks, 0)
    for name, block in distiller.method.paths.blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: counts.__setitem__(name, counts[name] + 1))
    return counts


def test_dropped_pathways_cost_nothing():
    paths = all_pathways(3, 3)
    z = torch.stack([torch.where(torch.arange(27) % 3 == 0, 1.0, 0.2), torch.zeros(27)])
    distiller, x, y = pair(process=Process(z, paths))
    counts = calls_of(distiller)
    distiller(x, y, progress=0.0)
    assert sum(counts.values()) == 9
    assert {name for name, n in counts.items() if n} == {p.name for p in paths[::3]}
    teacher = []
    distiller.teacher.register_forward_pre_hook(lambda *_: teacher.append(1))
    losses = distiller(x, y, progress=1.0)  # all are dropped at the end
    assert sum(counts.values()) == 9
    assert teacher == []
    torch.testing.assert_close(losses["loss"], losses["task"])


@pytest.mark.parametrize("method", ["reviewkd", "distpro"])
def test_feature_losses_grow_from_nothing_to_their_full_weight(method):
    name = {"reviewkd": "reviewkd", "distpro": "pathways"}[method]
    plain, x, y = pair(method=method, warm_up=0.0)
    full = plain.eval()(x, y, 0.0)[name]
    warm, x, y = pair(method=method)  # 20 of 240 epochs by default
    warm.eval()
    for progress, share in ((0.0, 0.0), (10 / 240, 0.5), (20 / 240, 1.0), (0.7, 1.0)):
        torch.testing.assert_close(warm(x, y, progress)[name], share * full)


def test_progress_is_counted_in_train_mode():
    paths = all_pathways(3, 3, "A")
    process = Process(torch.stack([torch.full((9,), 4.0), torch.full((9,), -4.0)]), paths, tau=None)
    distiller, x, y = pair(process=process, transforms="A", steps=5, warm_up=0.0)
    got = []
    for _ in range(5):
        got.append(distiller(x, y)["pathways"].item())
        distiller.eval()(x, y)  # an evaluation in between does not count
        distiller.train()
    weights = [process.at(k / 4).sum().item() for k in range(5)]
    assert all(a > b for a, b in itertools.pairwise(got))
    assert got[4] / got[0] == pytest.approx(weights[4] / weights[0], rel=0.2)
    again, x, y = pair(process=process, transforms="A", steps=5, warm_up=0.0)
    again.load_state_dict(distiller.state_dict())
    assert again.calls == 5  # a loop that was broken off goes on where it stood


@pytest.mark.parametrize(
    ("method", "options", "steady"),
    [
        ("none", {}, True),
        ("reviewkd", {}, False),  # its warm-up would be left out unseen
        ("reviewkd", {"warm_up": 0.0}, True),
        ("distpro", {}, False),
        ("distpro", {"warm_up": 0.0}, True),
        ("distpro", {"warm_up": 0.0, "process": Process(torch.rand(2, 27), all_pathways(3, 3))}, False),
    ],
)
def test_what_changes_over_a_training_must_hear_where_it_stands(method, options, steady):
    distiller, x, y = pair(method, **options)
    if steady:
        assert torch.equal(distiller.eval()(x, y)["loss"], distiller(x, y, progress=0.5)["loss"])
    else:
        with pytest.raises(UserError, match=r"steps=N\) or distiller\(x, y, progress="):
            distiller(x, y)


def test_state_dict_of_the_student_is_its_own():
    distiller, _, _ = pair()
    assert set(distiller.student.model.state_dict()) == set(create_model("wrn_10_1", 10).state_dict())


def test_wrong_words():
    with pytest.raises(UserError, match="unknown method 'reviewKD2': did you mean 'reviewkd'"):
        pair("reviewKD2")
    with pytest.raises(UserError, match="unknown option of method kd 'temprature': did you mean 'temperature'"):
        pair("kd", temprature=2)
    with pytest.raises(UserError, match="method kd needs a teacher"):
        Distiller(create_model("wrn_10_1", 10), image=IMAGE, method="kd")
    with pytest.raises(UserError, match="the teacher has 10 classes, the student 7"):
        Distiller(create_model("wrn_10_1", 7), create_model("resnet8", 10), image=IMAGE, method="kd")
    with pytest.raises(UserError, match="the process is for 1 pathways"):
        pair(process=Process.uniform(all_pathways(1, 1, "A")))


def test_calls_beyond_the_steps_are_told_once():
    distiller, x, y = pair("none", steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            distiller(x, y)
    with pytest.warns(UserWarning, match="more training calls than steps=2: the last loss weights are kept"):
        distiller(x, y)


def test_a_process_is_no_file_here():
    with pytest.raises(UserError, match=r"process 'a.safetensors': expected a Process, such as Process.load"):
        pair(process="a.safetensors")


def test_the_method_computes_in_the_student_s_type():
    student, teacher = create_model("wrn_10_1", 10).double(), create_model("resnet8", 10).double()
    distiller = Distiller(student, teacher, image=IMAGE, method="reviewkd")
    loss = distiller(torch.randn(2, *IMAGE).double(), torch.tensor([1, 2]), progress=1.0)["loss"]
    assert loss.dtype == torch.float64


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([], "the loader is empty"),
        (iter([1]), "a list_iterator has no length"),
        ([{"x": 1}], "a batch is a dict"),
        ([(torch.randn(2, *IMAGE), torch.ones(2), torch.ones(2))], r"a batch is a tuple\[torch.Size"),
        ([(torch.randn(2, 3), torch.ones(2))], r"a batch is a tuple\[torch.Size\(\[2, 3\]\)"),
    ],
)
def test_batches_of_another_kind_are_refused(batches, sentence):
    expected = r": expected an iterable of batches \(x \[N, C, H, W\], y \[N\]\) with a length"
    with pytest.raises(UserError, match=sentence + ".*" + expected):
        distill(create_model("wrn_10_1", 10), None, batches, Recipe(1), method="none")


def test_any_module_as_student():
    student = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, 2, 1))
    student.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(9, 10))
    distiller = Distiller(student, create_model("resnet8", 10), image=IMAGE, student_layers=["1", "3"]).train()
    assert len(distiller.method.paths) == 3 * 2 * 3
    distiller(torch.randn(2, *IMAGE), torch.tensor([1, 2]), progress=0.5)["loss"].backward()


def late_process(paths):
    """Teacher stage 1 first, all three in the middle, none at the end."""
    stage = torch.tensor([p.teacher for p in paths])
    return Process(torch.stack([(stage <= 1).float(), (stage <= 3).float(), torch.zeros(len(paths))]), paths)


def test_the_teacher_is_run_as_deep_as_a_pathway_needs_it():
    paths = all_pathways(3, 3, "A")
    distiller, x, y = pair(process=late_process(paths), transforms="A")
    ran = []
    for index in (1, 2, 3):
        layer = getattr(distiller.teacher.model, f"layer{index}")
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    for progress, expected in ((0.0, [1]), (0.5, [1, 2, 3]), (1.0, [])):
        ran.clear()
        distiller(x, y, progress=progress)
        assert ran == expected
    whole, cut = distiller.teacher(x), distiller.teacher(x, 2)
    assert len(cut.maps) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.maps, cut.maps, strict=False))


def test_a_dropped_pathway_waits_unchanged_until_it_returns():
    paths = all_pathways(3, 3, "A")
    distiller, x, y = pair(process=late_process(paths), transforms="A")
    step = DistillStep(distiller, Recipe(epochs=1, lr=0.05))
    step(x, y, 0.5)
    block = distiller.method.paths.blocks["t3-s3-A"]
    weight = block[0].weight.clone()
    momentum = step.optimizer.state[block[0].weight]["momentum_buffer"].clone()
    assert momentum.any()
    for _ in range(3):
        step(x, y, 0.0)  # teacher stage 1 alone: weight decay and momentum must not move the others
    assert torch.equal(block[0].weight, weight)
    assert torch.equal(step.optimizer.state[block[0].weight]["momentum_buffer"], momentum)
    step(x, y, 0.5)
    assert not torch.equal(block[0].weight, weight)


@pytest.mark.slow
def test_compiled_parts_train_the_same():
    """Blocks that are dropped for a while included: none is compiled with another."""
    process = Process(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), all_pathways(3, 3, "A", "same"))
    torch.manual_seed(1)
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(4)]
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student, teacher = create_model("wrn_10_1", 10, 1), create_model("resnet8", 10, 1)
        options = {"process": process, "transforms": "A", "pathways": "same", "compile": compiled}
        distill(student, teacher, batches, Recipe(2, lr=0.01), **options)
        states.append(student.state_dict())
    assert list(states[0]) == list(states[1])
    for got, want in zip(states[1].values(), states[0].values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
