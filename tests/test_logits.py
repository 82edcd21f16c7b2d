"""Losses between logits against their definitions, and as pathways of a process."""

import pytest
import torch
from oracle import logit_loss

from distpro import Process
from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.logits import LOGIT_LOSSES, kd
from distpro.models import create_model
from distpro.pathways import Pathway, all_pathways
from distpro.report import plot_process


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_against_the_definition(kind):
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher, y = 3 * torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3, 1])
    got, want = LOGIT_LOSSES[kind](student, teacher, y), logit_loss(kind, student, teacher, y)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(lambda s: LOGIT_LOSSES[kind](s, teacher, y), student)


@pytest.mark.parametrize("kind", LOGIT_LOSSES)
def test_extremes_stay_finite_and_16_bits_compute_in_32(kind):
    y = torch.tensor([0, 1])
    far = torch.tensor([[200.0, -200.0, 0.0], [0.0, 100.0, -300.0]], requires_grad=True)
    loss = LOGIT_LOSSES[kind](far, -far.detach(), y)
    (gradient,) = torch.autograd.grad(loss, far)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if kind != "DIST":  # a class that no image has is correlated with nothing, itself included
        torch.testing.assert_close(LOGIT_LOSSES[kind](far, far.detach(), y), torch.zeros(()), atol=1e-4, rtol=0)
    short = torch.randn(4, 9).bfloat16()
    assert LOGIT_LOSSES[kind](short, short.flip(0), torch.zeros(4).long()).dtype == torch.float32


def test_names():
    paths = all_pathways(2, 2, "A", logits=("KD", "DIST"))
    assert [p.name for p in paths[-2:]] == ["logits-KD", "logits-DIST"]
    assert Pathway.parse("logits-DIST") == paths[-1] == Pathway(0, 0, "DIST")
    with pytest.raises(UserError, match=r"unknown logit pathway 'DKt': did you mean 'DKD'"):
        all_pathways(1, 1, logits=("DKt",))


PAIR = {"image": (1, 8, 8), "transforms": "A", "logit_pathways": ("KD", "DKD"), "kd_weight": 0.5}


def distiller(**options):
    torch.manual_seed(0)
    student, teacher = create_model("wrn_10_1", 10, 1), create_model("resnet8", 10, 1)
    return Distiller(student, teacher, **{**PAIR, **options}).train()


def test_logits_are_pathways_of_the_process():
    """11 pathways: the loss is the mean of all of them, times P * kd_weight, as Eq. 2 has it."""
    made = distiller()
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    torch.manual_seed(1)
    got = made(x, y, 1.0)
    features = distiller(logit_pathways=())
    torch.manual_seed(1)
    without = features(x, y, 1.0)
    logits, teacher = distiller().student(x).logits, made.teacher(x).logits
    terms = sum(LOGIT_LOSSES[kind](logits, teacher, y) for kind in ("KD", "DKD"))
    torch.testing.assert_close(got["pathways"], without["pathways"] + 0.5 * terms)
    got["loss"].backward()
    assert made.student.model.get_classifier().weight.grad.abs().sum() > 0


def test_the_teacher_runs_to_its_logits_only_while_they_count():
    paths = all_pathways(3, 3, "A", logits=("KD", "DKD"))
    early = torch.tensor([[1.0] * 3 + [0.0] * 8, [0.0] * 10 + [1.0]])
    made = distiller(process=Process(early, paths, tau=0.2))
    assert made.method.moment(0.0).depth == 1
    assert made.method.moment(1.0).depth is None
    assert made.method.moment(1.0).active == (10,)
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    loss = made(x, y, 1.0)
    assert loss["pathways"] > 0
    assert all(p.grad is None for p in made.method.parameters())


def test_classes_must_agree():
    student, teacher = create_model("wrn_10_1", 10, 1), create_model("resnet8", 12, 1)
    with pytest.raises(UserError, match="a logit pathway compares logits: the teacher has 12 classes, the student 10"):
        Distiller(student, teacher, **PAIR)


def test_a_process_with_logits_is_kept_and_drawn(tmp_path):
    process = Process(torch.rand(5, 6), all_pathways(2, 2, "A", logits=("KD", "LSKD")))
    process.save(tmp_path / "p.safetensors")
    assert Process.load(tmp_path / "p.safetensors").pathways == process.pathways
    titles = [axes.get_title(loc="left") for axes in plot_process(process).axes]
    assert titles == ["Logits", "Teacher stage 1", "Teacher stage 2", "Sum by teacher stage"]


def test_kd_the_method_and_kd_the_pathway_are_one_function():
    made = Distiller(create_model("wrn_10_1", 10, 1), create_model("resnet8", 10, 1), image=(1, 8, 8), method="kd")
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    made.eval()
    got = made(x, y, 0.0)["kd"]
    torch.testing.assert_close(got, 0.9 * kd(made.student(x).logits, made.teacher(x).logits, y))
