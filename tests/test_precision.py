"""Other number types and layouts: the same training, as near as the type allows."""

import pytest
import torch

from distpro import Distiller, Recipe, distill
from distpro.data import create_dataset
from distpro.distillation import DistillStep
from distpro.features import Teacher
from distpro.models import create_model
from distpro.precision import Precision
from distpro.search_step import SearchStep

IMAGE = (1, 8, 8)
BF16 = Precision(torch.bfloat16, channels_last=True)
RECIPE = Recipe(epochs=2, lr=0.01)  # at 0.05 rounding alone moves a window of the curve by 6 %
STEPS = 200


@pytest.fixture(scope="module")
def digits():
    return create_dataset("digits")


def networks():
    torch.manual_seed(0)
    return create_model("wrn_10_1", 10, 1), create_model("resnet8", 10, 1)


def losses_of(step, digits):
    """The loss at each of 200 steps over the same batches."""
    loader = digits.train.loader(16, shuffle=True, augment=True, seed=0, drop_last=True)
    rows = []
    while len(rows) < STEPS:
        rows += [float(step(x, y, 0.5)["loss"].detach()) for x, y in loader]
    return torch.tensor(rows[:STEPS])


def distilling(precision):
    student, teacher = networks()
    distiller = Distiller(student, teacher, image=IMAGE, transforms="AE", precision=precision).train()
    return DistillStep(distiller, RECIPE)


def searching(precision, validation, **options):
    distiller = Distiller(*networks(), image=IMAGE, transforms="AE", warm_up=0.0, precision=precision).train()
    optimizer = RECIPE.optimizer(distiller.trainable_parameters())
    return SearchStep(distiller, optimizer, validation, steps=400, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(Precision(channels_last=True), 0.01), (BF16, 0.02), (Precision(teacher=torch.float32), 0.01)],
    ids=["channels_last", "bfloat16", "folded teacher"],
)
def test_the_loss_curve_of_a_distillation_stays(digits, precision, tolerance):
    plain, other = (losses_of(distilling(p), digits) for p in (Precision(), precision))
    assert plain[-20:].mean() < 0.6 * plain[:20].mean()  # there is a curve to follow
    windows = [(curve.unfold(0, 20, 20).mean(1)) for curve in (plain, other)]
    torch.testing.assert_close(windows[1], windows[0], rtol=tolerance, atol=0)


@pytest.mark.slow
def test_the_loss_curve_and_the_weights_of_a_search_stay(digits):
    validation = digits.test.loader(16, shuffle=True, augment=False, seed=1)
    # Adam on z amplifies rounding: at its usual rate of 0.05 the last window is 0.11 away, at 0.03 none more than 0.03
    steps = [searching(p, validation, alpha_lr=0.03) for p in (Precision(), BF16)]
    curves = [losses_of(step, digits).unfold(0, 50, 50).mean(1) for step in steps]
    torch.testing.assert_close(curves[1], curves[0], rtol=0.1, atol=0)
    moved = steps[0].z - 1
    assert moved.abs().max() > 0.3
    assert torch.nn.functional.cosine_similarity(steps[1].z - 1, moved, 0) > 0.9


def test_the_finite_difference_stays_in_float32(digits):
    """In bfloat16 two losses that differ by a thousandth would be equal, and z would stand still or jump."""
    validation = digits.test.loader(64, shuffle=False, augment=False)
    x, y = next(iter(digits.train.loader(64, shuffle=False, augment=False)))
    moves = []
    for name in ("exact", "finite-difference"):
        step = searching(BF16, validation, hypergradient=name)
        step.adam = torch.optim.SGD([step.z], lr=1.0)  # z then moves by the hypergradient itself
        step(x, y, 0.0)
        moves.append(step.z - 1)
    assert torch.nn.functional.cosine_similarity(*moves, 0) > 0.95


def test_what_is_trained_and_saved_stays_float32(digits):
    student, teacher = networks()
    keys = list(student.state_dict())
    loader = digits.train.subset(range(64)).loader(32, shuffle=True, augment=True)
    precision = Precision(torch.bfloat16, True, torch.bfloat16)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distill(student, teacher, loader, Recipe(epochs=1), precision=precision, transforms="A", test=loader)
    assert list(student.state_dict()) == keys
    assert all(v.dtype is torch.float32 for v in student.state_dict().values() if v.is_floating_point())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("method", ["kd", "reviewkd", "distpro"])
def test_a_teacher_in_bfloat16_says_nearly_the_same(digits, method):
    x, y = next(iter(digits.train.loader(64, shuffle=False, augment=False)))
    values = []
    for precision in (Precision(), Precision(teacher=torch.bfloat16)):
        student, teacher = networks()
        torch.manual_seed(1)
        distiller = Distiller(student, teacher, image=IMAGE, method=method, precision=precision).train()
        values.append(distiller(x, y, 1.0 if method != "distpro" else 0.0)["loss"])
        assert values[-1].dtype is torch.float32
        if precision.teacher:
            kinds = {p.dtype for p in distiller.teacher.parameters()}
            assert kinds == {torch.bfloat16}
            assert {p.dtype for p in teacher.parameters()} == {torch.float32}  # the user's own is left alone
    torch.testing.assert_close(values[1], values[0], rtol=2e-2, atol=0)


def test_a_teacher_in_its_own_type_is_still_cut(digits):
    _, teacher = networks()
    reader = Teacher(teacher, IMAGE, precision=Precision(teacher=torch.bfloat16))
    x = torch.randn(4, *IMAGE)
    assert [tuple(m.shape) for m in reader(x, 2).maps] == [tuple(m.shape) for m in reader(x).maps][:2]
