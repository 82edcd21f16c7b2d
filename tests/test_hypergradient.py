"""The hypergradient against double backward through the real optimizer step, and the traps around it."""

import copy
import itertools

import pytest
import torch
from oracle import hypergradient as oracle

from distpro import Distiller
from distpro.errors import UserError
from distpro.hypergradient import RADIUS, Stateless, step_sizes
from distpro.models import create_model
from distpro.pathways import all_pathways
from distpro.process import NORMALISATIONS, normaliser
from distpro.search_step import SearchStep


class Strided(torch.nn.Sequential):
    """A user's own network, half the size of the zoo's at every stage and of other widths; read by layer names."""

    def __init__(self, classes, channels):
        widths = (channels, 6, 10, 12)
        stages = [
            torch.nn.Sequential(
                torch.nn.Conv2d(i, o, 3, 2, 1, bias=False),
                torch.nn.BatchNorm2d(o),
                torch.nn.SiLU(),
                torch.nn.Conv2d(o, o, 3, 1, 1, bias=False),
                torch.nn.BatchNorm2d(o),
            )
            for i, o in itertools.pairwise(widths)
        ]
        super().__init__(*stages, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, classes))


# teacher, student, image: one family; unlike families; unlike stage sizes (12, 6, 3 against 6, 3, 2) and own layers
PAIRS = [
    ("wrn_10_1", "wrn_10_1", (1, 8, 8)),
    ("resnet8", "wrn_10_1", (3, 8, 8)),
    ("resnet8", Strided, (3, 12, 12)),
]
IDS = ["wrn-wrn", "resnet-wrn", "resnet-strided"]


def network(name, image):
    return name(10, image[0]) if name is Strided else create_model(name, 10, image[0])


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def setting(pair, dtype=torch.float64, transforms="AB", sgd=SGD, warm=2, frozen=(), logits=(), weight=0.3, **options):
    """A pair some steps into its search, so that momentum, BN statistics and z are no longer their first values."""
    torch.manual_seed(0)
    teacher_name, student_name, image = pair
    layers = ["0", "1", "2"] if student_name is Strided else None
    teacher = network(teacher_name, image).to(dtype)
    student = network(student_name, image).to(dtype)
    for name in frozen:
        student.get_submodule(name).requires_grad_(False)
    loss = {"transforms": transforms, "logit_pathways": logits, "kd_weight": weight, "warm_up": 0.0}
    distiller = Distiller(student, teacher, image=image, student_layers=layers, **loss).train()
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), **sgd)
    batches = [(torch.randn(16, *image, dtype=dtype), torch.randint(10, (16,))) for _ in range(6)]
    options = {"literal_xi": True, "steps": 9, **options}
    step = SearchStep(distiller, optimizer, batches[3:], **options)
    for k in range(warm):
        step(*batches[k], 0.0)
    step.z += 0.3 * torch.randn_like(step.z)
    return step, batches[2], step.validation[step.validated % 3]


def true_gradient(step, batch, val_batch, keep=0.0):
    arguments = (step.student, step.teacher, step.pathways, step.optimizer, step.z, step.normalise, step.scale)
    return oracle(*arguments, batch, val_batch, step.averages, keep)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
def test_exact_is_the_double_backward(pair, dtype, bound):
    step, batch, val_batch = setting(pair, dtype)
    if dtype == torch.float32:  # the truth of the same float32 state, in float64
        twin, _, _ = setting(pair, warm=0)
        twin.load_state_dict(copy.deepcopy(step.state_dict()))
        twin.teacher.load_state_dict(step.teacher.state_dict())
        want = true_gradient(twin, *[(x.double(), y) for x, y in (batch, val_batch)])
    else:
        want = true_gradient(step, batch, val_batch)
    step(*batch, 0.0)
    error = relative(step.z.grad.double(), want)
    print(f"exact, {dtype}: relative error {error:.1e}")
    assert error < bound


def test_logits_have_a_hypergradient_too():
    """Searched together with the features: exact against double backward, and finite differences against exact."""
    logits = ("KD", "DKD", "DIST", "LSKD")
    step, batch, val_batch = setting(PAIRS[1], logits=logits)
    want = true_gradient(step, batch, val_batch)
    assert want.shape == (9 * 2 + 4,)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < 1e-8
    assert relative(step.z.grad[-4:], want[-4:]) < 1e-8
    difference, batch, _ = setting(PAIRS[1], logits=logits, radius=1e-5)
    difference.hypergradient = "finite-difference"
    difference(*batch, 0.0)
    assert relative(difference.z.grad, want) < 1e-4


@pytest.mark.parametrize(
    "sgd",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.01},
        {"lr": 0.02, "momentum": 0.8},
        {"lr": 0.02, "momentum": 0.8, "nesterov": True},
    ],
    ids=["plain", "decay", "momentum", "nesterov"],
)
@pytest.mark.parametrize("warm", [0, 2], ids=["first-step", "later"])
def test_every_form_of_sgd(sgd, warm):
    step, batch, val_batch = setting(PAIRS[0], sgd=sgd, warm=warm)
    want = true_gradient(step, batch, val_batch)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < 1e-8


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_every_normalisation(normalisation):
    step, batch, val_batch = setting(PAIRS[0], normalisation=normalisation)
    want = true_gradient(step, batch, val_batch)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < 1e-8


@pytest.mark.parametrize(("decay", "keep"), [(0.6, 0.6), (0.9, 2 / 3)], ids=["exponential", "even"])
@pytest.mark.parametrize("hypergradient", ["exact", "finite-difference"])
def test_the_loss_of_an_averaged_student(decay, keep, hypergradient):
    """Differentiated at the average of theta that theta' enters; the first steps are averaged evenly."""
    step, batch, val_batch = setting(PAIRS[0], val_ema=decay, hypergradient=hypergradient, radius=1e-5)
    want = true_gradient(step, batch, val_batch, keep)
    plain, _, _ = setting(PAIRS[0])
    step(*batch, 0.0)
    assert relative(step.z.grad * (1 - keep), want) < (1e-8 if hypergradient == "exact" else 1e-4)
    plain(*batch, 0.0)
    assert relative(step.z.grad, plain.z.grad) > 0.01, "the average has to differ for this to show anything"


def test_the_average_is_that_of_every_step():
    """Whether z moves at a step or not, and once if the step is taken again."""
    for options in ({}, {"alpha_every": 3}, {"alpha_first": True}):
        step, batch, _ = setting(PAIRS[0], warm=0, val_ema=0.75, **options)
        seen = []
        for _ in range(6):
            step(*batch, 0.0)
            seen.append(step.theta[0].detach().clone())
        want = seen[0]
        for t, theta in enumerate(seen[1:], 1):
            keep = min(0.75, t / (t + 1))
            want = keep * want + (1 - keep) * theta
        torch.testing.assert_close(step.averages[0], want)


def test_biased_softmax_formula():
    """DESIGN: dL/dz_p = -xi w a_p (h_p - sum_q a_q h_q), with g = 1."""
    from distpro.hypergradient import through_normalisation

    h, z = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    a = z.exp() / (z.exp().sum() + torch.tensor(1.0, dtype=torch.float64).exp())
    want = -3.0 * a * (h - (a * h).sum())
    normalise = normaliser("biased-softmax", all_pathways(1, 5, "A"), z)
    torch.testing.assert_close(through_normalisation(h, z, normalise, 3.0), want)


@pytest.mark.parametrize("pair", PAIRS, ids=IDS)
def test_finite_difference_converges(pair):
    errors = {}
    for radius in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        step, batch, val_batch = setting(pair, warm=0, hypergradient="finite-difference", radius=radius)
        want = true_gradient(step, batch, val_batch)
        step(*batch, 0.0)
        errors[radius] = relative(step.z.grad, want)
    print(f"finite difference in fp64 by radius: {', '.join(f'{r:g}: {e:.1e}' for r, e in errors.items())}")
    assert errors[1e-5] < 1e-3
    assert errors[1e-5] < 0.1 * errors[1e-1]
    assert errors[RADIUS] < 0.1  # the default's, printed above


def test_alpha_first_takes_the_same_gradient_and_a_newer_weight():
    plain, batch, val_batch = setting(PAIRS[0])
    first, _, _ = setting(PAIRS[0], warm=0, alpha_first=True)
    first.load_state_dict(copy.deepcopy(plain.state_dict()))
    want = true_gradient(plain, batch, val_batch)
    before = plain.z.clone()
    plain(*batch, 0.0)
    first(*batch, 0.0)
    assert relative(first.z.grad, want) < 1e-8
    torch.testing.assert_close(plain.z_record[2], before.float())
    torch.testing.assert_close(first.z_record[2], first.z.float())
    # and theta is the one that the new weights give: one plain step of a third setting that starts with them
    third, _, _ = setting(PAIRS[0])
    third.z.copy_(first.z)
    third._train_step(*batch, torch.tensor(third.scale, dtype=torch.float64))
    for got, expected in zip(first.theta, third.theta, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for got, expected in zip(first.student.buffers(), third.student.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_alpha_first_on_the_very_first_step():
    first, batch, _ = setting(PAIRS[0], warm=0, alpha_first=True)
    third, _, _ = setting(PAIRS[0], warm=0)
    first(*batch, 0.0)
    third.z.copy_(first.z)
    third._train_step(*batch, torch.tensor(third.scale, dtype=torch.float64))
    for got, expected in zip(first.theta, third.theta, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hypergradient", ["exact", "finite-difference"])
def test_traps(hypergradient):
    """theta' is adopted; BN follows the train pass alone; the teacher stands still; nothing is left behind."""
    step, batch, _ = setting(PAIRS[0], hypergradient=hypergradient)
    plain, _, _ = setting(PAIRS[0], hypergradient=hypergradient)
    step.teacher.model.train()  # as a user's own loop might
    teacher = {k: v.clone() for k, v in step.teacher.state_dict().items()}
    step(*batch, 0.0)
    plain._train_step(*batch, torch.tensor(plain.scale, dtype=torch.float64))
    assert not any(module.training for module in step.teacher.modules())
    for name, value in step.teacher.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    for side in ("student", "pathways"):
        for (name, got), want in zip(
            getattr(step, side).state_dict().items(), getattr(plain, side).state_dict().values(), strict=True
        ):
            assert torch.equal(got, want), f"{side} {name} was moved by another pass than the train pass"
    assert all(p.grad is None for p in (*step.theta, *step.phi))
    moved = [b for n, b in step.student.named_buffers() if n.endswith("num_batches_tracked")]
    assert {int(b) for b in moved} == {3}  # two warm steps and this one


@pytest.mark.parametrize(("hypergradient", "bound"), [("exact", 1e-8), ("finite-difference", 1e-3)])
def test_dropout_is_the_same_in_every_pass(hypergradient, bound):
    """With dropout in the student, both still are the derivative of the very pass that was trained."""
    torch.manual_seed(0)
    step, batch, val_batch = setting(PAIRS[0], hypergradient=hypergradient, radius=1e-5)
    first = next(m for m in step.student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.register_forward_hook(lambda module, inputs, output: torch.nn.functional.dropout(output, 0.3, True))
    state = torch.get_rng_state()
    want = true_gradient(step, batch, val_batch)
    torch.set_rng_state(state)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < bound


def test_frozen_parameters_stay_out():
    step, batch, val_batch = setting(PAIRS[0], frozen=["conv1"])
    weight = step.student.model.conv1.weight
    before = weight.clone()
    want = true_gradient(step, batch, val_batch)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < 1e-8
    assert torch.equal(weight, before)


def test_pathways_from_frozen_stages_move_nothing():
    """A fine-tuning whose shallow layers rest: what is compared there says nothing of what is trained."""
    step, batch, val_batch = setting(PAIRS[1], frozen=["conv1", "block1", "block2.layer.0.bn1"])
    want = true_gradient(step, batch, val_batch)
    step(*batch, 0.0)
    assert relative(step.z.grad, want) < 1e-8
    with pytest.raises(UserError, match="no pathway starts from a map that depends on what is trained"):
        setting(PAIRS[1], frozen=["conv1", "block1", "block2", "block3", "bn1"])


class Twice(torch.nn.Module):
    """A user's network whose first layers have two names, as where a stem is put together of them."""

    def __init__(self, classes, channels, twice):
        super().__init__()
        conv, bn = torch.nn.Conv2d(channels, 6, 3, 1, 1), torch.nn.BatchNorm2d(6)
        if twice:
            self.conv, self.bn = conv, bn
        self.stem = torch.nn.Sequential(conv, bn, torch.nn.ReLU())
        self.body = torch.nn.Conv2d(6, 8, 3, 2, 1)
        self.head = torch.nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("how", ["exact", "finite-difference"])
def test_layers_with_two_names_are_searched_as_those_with_one(how):
    found = []
    for twice in (False, True):
        torch.manual_seed(0)
        student, teacher = Twice(10, 3, twice).double(), create_model("resnet8", 10).double()
        layers = {"student_layers": ["stem", "body"], "teacher_layers": ["layer1", "layer2"]}
        distiller = Distiller(student, teacher, image=(3, 8, 8), transforms="A", warm_up=0.0, **layers).train()
        optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(1)
        batches = [(torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))) for _ in range(6)]
        step = SearchStep(distiller, optimizer, batches[4:], steps=4, hypergradient=how)
        before = [*student.parameters(), *student.buffers()]
        for x, y in batches[:4]:
            step(x, y, 0.0)
        assert all(a is b for a, b in zip(before, [*student.parameters(), *student.buffers()], strict=True))
        assert student.stem[1].num_batches_tracked == 4
        found.append([step.z, *student.stem.state_dict().values()])
    for once, both in zip(*found, strict=True):
        torch.testing.assert_close(both, once, rtol=1e-12, atol=1e-12)


def test_step_sizes():
    weight = torch.nn.Parameter(torch.zeros(2))
    assert step_sizes(torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True), [weight]) == pytest.approx([0.19])
    assert step_sizes(torch.optim.SGD([weight], lr=0.1, momentum=0.9), [weight]) == [0.1]
    with pytest.raises(UserError, match="got AdamW"):
        step_sizes(torch.optim.AdamW([weight]), [weight])


def test_stateless_leaves_buffers():
    norm = torch.nn.BatchNorm1d(3)
    before = copy.deepcopy(norm.state_dict())
    Stateless(norm)(list(norm.parameters()), torch.randn(8, 3))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values(), strict=True))
