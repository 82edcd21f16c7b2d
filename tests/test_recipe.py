"""Schedules, decay groups, smoothing and averaging of a recipe."""

import pytest
import torch
import torch.nn.functional as F

from distpro import search_by_gradient
from distpro.config import Config, fill
from distpro.data import create_dataset
from distpro.distillation import DistillStep, distill
from distpro.distiller import Distiller
from distpro.errors import UserError
from distpro.loop import Observer, fit
from distpro.models import create_model
from distpro.recipe import Recipe
from distpro.tasks import Classification


class Killed(Exception):
    """Stands for whatever ends a run between two epochs."""


class Breaks(Observer):
    def epoch(self, row):
        raise Killed


def rates(recipe, per_epoch=10):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = recipe.optimizer([parameter])
    scheduler, seen = recipe.scheduler(optimizer, per_epoch), []
    for _ in range(recipe.epochs * per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    return seen


def test_one_cycle_rises_for_a_fifth_and_falls_to_nothing():
    seen = rates(Recipe(5, lr=0.3, sched="onecycle"))
    peak = max(range(50), key=seen.__getitem__)
    assert peak in (9, 10)
    assert seen[peak] == pytest.approx(0.3, rel=0.05)
    assert seen[:peak] == sorted(seen[:peak])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)
    assert 0 < seen[-1] < 0.01
    falls = [a - b for a, b in zip(seen[peak + 1 :], seen[peak + 2 :], strict=False)]
    assert max(falls) == pytest.approx(min(falls), rel=1e-6)  # linear


def test_the_paper_s_rate_falls_at_150_180_and_210_of_240_epochs():
    seen = rates(Recipe(240, lr=0.1, sched="step"), 2)
    assert [seen[2 * epoch] for epoch in (0, 149, 150, 180, 210, 239)] == pytest.approx(
        [0.1, 0.1, 1e-2, 1e-3, 1e-4, 1e-4]
    )


def test_momentum_stays_over_one_cycle_and_may_be_none():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Recipe(4, sched="onecycle").optimizer([parameter])
    scheduler = Recipe(4, sched="onecycle").scheduler(optimizer, 5)
    for _ in range(20):
        assert optimizer.param_groups[0]["momentum"] == 0.9
        optimizer.step()
        scheduler.step()
    (group,) = Recipe(4, momentum=0.0).optimizer([parameter]).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.0, False)


def test_progress_goes_from_the_first_step_to_the_last_of_all_epochs(tmp_path):
    class Listens(DistillStep):
        def __call__(self, x, y, progress):
            heard.append(progress)
            return super().__call__(x, y, progress)

    def run(epochs, resume=False):
        torch.manual_seed(0)
        step = Listens(Distiller(create_model("wrn_10_1", 10, 1), image=(1, 8, 8), method="none").train(), Recipe(4))
        scheduler = Recipe(4).scheduler(step.optimizer, 3)
        fit(step, train, scheduler, epochs, checkpoint=tmp_path / "last.pt", resume=resume, observer=observer)

    train = [(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])) for _ in range(3)]
    heard, observer = [], Breaks()
    with pytest.raises(Killed):
        run(4)
    observer = Observer()
    run(4, resume=True)
    assert heard == pytest.approx([k / 11 for k in range(12)])
    train.pop()
    with pytest.raises(UserError, match=r"last.pt': its epochs have 3 batches, those of this data set 2$"):
        run(4, resume=True)


def test_norms_and_biases_are_not_decayed_where_asked():
    model = create_model("resnet8", 10)
    for recipe, kept in ((Recipe(1), False), (Recipe(1, norm_decay=False), True)):
        twin = create_model("resnet8", 10)
        twin.load_state_dict(model.state_dict())
        optimizer = recipe.optimizer(twin.parameters())
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for (name, before), after in zip(model.named_parameters(), twin.parameters(), strict=True):
            still = torch.equal(before, after) or not before.any()
            assert still == (not before.any() or (kept and before.ndim == 1)), name


def test_smoothing_is_in_the_loss_and_not_in_the_metrics():
    logits, y = torch.randn(6, 10), torch.randint(10, (6,))
    smooth = torch.full((6, 10), 0.1 / 10).scatter_(1, y[:, None], 0.9 + 0.1 / 10)
    want = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Classification(0.1).loss(logits, y), want)
    metrics = Classification(0.1).evaluate(torch.nn.Identity(), [(logits, y)])
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)


def test_the_average_is_the_result(tmp_path):
    """Against an average kept by hand, after an interruption too."""
    data = create_dataset("digits")
    train = data.train.loader(128, shuffle=True, augment=True, drop_last=True)
    recipe = Recipe(2, lr=0.1, ema=0.8)

    def student():
        torch.manual_seed(0)
        return create_model("wrn_10_1", 10, 1)

    step = DistillStep(Distiller(student(), image=data.shape, method="none").train(), recipe)
    scheduler, want = recipe.scheduler(step.optimizer, len(train)), None
    for epoch in range(2):
        train.set_epoch(epoch)
        for x, y in train:
            step(x, y, 0.0)
            scheduler.step()
            now = {k: v.clone() for k, v in step.distiller.student.model.state_dict().items()}
            old = now if want is None else want
            want = {k: v.lerp(now[k], 0.2) if v.is_floating_point() else now[k] for k, v in old.items()}
    options = {"method": "none", "image": data.shape, "checkpoint": tmp_path / "last.pt"}
    whole = student()
    distill(whole, None, train, recipe, **options)
    for name, value in whole.state_dict().items():
        if value.is_floating_point():  # of a counter of batches there is no average
            torch.testing.assert_close(value, want[name], msg=name)
    assert not torch.equal(whole.state_dict()["conv1.weight"], now["conv1.weight"])

    (tmp_path / "last.pt").unlink()
    with pytest.raises(Killed):
        distill(student(), None, train, recipe, observer=Breaks(), **options)
    resumed = student()
    distill(resumed, None, train, recipe, resume=True, **options)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_layer_with_two_names_is_averaged_once():
    network = create_model("wrn_10_1", 10, 1)
    network.alias = network.conv1
    step = DistillStep(Distiller(network, image=(1, 8, 8), method="none").train(), Recipe(1, lr=0.5, ema=0.8))
    want = None
    for _ in range(4):
        step(torch.randn(4, 1, 8, 8), torch.randint(10, (4,)), 0.0)
        now = network.conv1.weight.detach().clone()
        want = now if want is None else want.lerp(now, 0.2)
    torch.testing.assert_close(step.result().conv1.weight, want)
    assert not torch.equal(want, now)


def test_an_evaluation_leaves_every_mode_as_it_was():
    network = create_model("wrn_10_1", 10, 1).train()
    network.block1.eval()
    modes = [module.training for module in network.modules()]
    Classification().evaluate(network, [(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]))])
    assert [module.training for module in network.modules()] == modes


def test_a_batch_in_parts_gives_the_same_step():
    """Where no BN sees the parts: a student in eval mode."""
    x, y = next(iter(create_dataset("digits").train.loader(10, shuffle=True, augment=False)))
    left = []
    for parts in (1, 3):
        torch.manual_seed(0)
        distiller = Distiller(create_model("resnet8", 10, 1).double(), image=(1, 8, 8), method="none").eval()
        step = DistillStep(distiller, Recipe(1, lr=0.1, grad_accum_steps=parts))
        told = step(x.double(), y, 0.0)
        left.append([told["loss"], told["task"], *(p.detach() for p in distiller.parameters())])
    for one, several in zip(*left, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-12)


def test_the_parts_of_a_batch_are_alike():
    """Of 9 images in 4 parts chunk() would make three; of 13 a last part of one, which BN refuses."""
    distiller = Distiller(create_model("resnet8", 10, 1), image=(1, 8, 8), method="none").train()
    step = DistillStep(distiller, Recipe(1, lr=0.1, grad_accum_steps=4))
    seen = []
    distiller.student.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for count in (9, 13, 3):
        losses = step(torch.randn(count, 1, 8, 8), torch.randint(10, (count,)), 0.0)
    assert seen == [3, 2, 2, 2, 4, 3, 3, 3, 1, 1, 1]
    assert losses["loss"].isfinite()


def test_an_epoch_is_kept_where_its_evaluation_fails(tmp_path):
    train = create_dataset("digits").train.subset(range(64)).loader(16, shuffle=True, augment=True)
    batches = list(create_dataset("digits").test.loader(64, shuffle=False, augment=False))

    class Torn:
        """Fails at the second evaluation."""

        def __init__(self, fails):
            self.fails, self.passes = fails, 0

        def __iter__(self):
            self.passes += 1
            if self.fails and self.passes == 2:
                raise UserError("cannot read image")
            return iter(batches)

    def trained(name, fails=False, resume=False):
        torch.manual_seed(0)
        train.set_epoch(0)
        options = {"test": Torn(fails), "checkpoint": tmp_path / name, "resume": resume}
        return distill(create_model("resnet8", 10, 1), None, train, Recipe(3, lr=0.1), method="none", **options)

    want = trained("whole.pt")
    with pytest.raises(UserError, match="cannot read image"):
        trained("torn.pt", fails=True)
    assert len(torch.load(tmp_path / "torn.pt")["history"]) == 2
    got = trained("torn.pt", resume=True)
    times = ("seconds", "wait_seconds")
    assert [{k: v for k, v in row.items() if k not in times} for row in got] == [
        {k: v for k, v in row.items() if k not in times} for row in want
    ]


def test_a_search_by_gradient_refuses_parts():
    model = create_model("resnet8", 10, 1)
    with pytest.raises(UserError, match="--grad-accum-steps only applies to the distillation"):
        search_by_gradient(model, model, [], [], Recipe(1, grad_accum_steps=2))
    with pytest.raises(UserError, match="--ema only applies to the distillation"):
        search_by_gradient(model, model, [], [], Recipe(1, ema=0.9))


def test_a_training_ends_after_so_many_steps_of_its_schedule(tmp_path):
    train = create_dataset("digits").train.subset(range(64)).loader(16, shuffle=True, augment=True)
    rows = {}
    for most in (None, 6):
        torch.manual_seed(0)
        recipe = Recipe(3, lr=0.1, max_steps=most)
        kept = tmp_path / f"{most}.pt"
        rows[most] = distill(create_model("resnet8", 10, 1), None, train, recipe, method="none", checkpoint=kept)
        train.set_epoch(0)
    assert [row["images"] for row in rows[None]] == [64, 64, 64]
    assert [row["images"] for row in rows[6]] == [64, 32]  # four steps, and two of the second epoch
    for key in ("lr", "train_loss"):
        assert rows[6][0][key] == rows[None][0][key]
    assert 0 < rows[6][1]["wait_seconds"] < rows[6][1]["seconds"]
    assert len(torch.load(tmp_path / "6.pt")["history"]) == 1  # the second epoch was not whole


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({"dataset": "cifar100", "teacher": "resnet56", "student": "resnet20"}, (1.0, 0.6)),
        ({"dataset": "cifar100", "teacher": "resnet56", "student": "resnet20", "process": "uniform"}, (0.6, 0.6)),
        ({"dataset": "cifar100", "teacher": "resnet56", "student": "resnet20", "recipe": "paper"}, (0.6, 0.6)),
        ({"dataset": "cifar100", "teacher": "resnet56", "student": "resnet20", "recipe": "fast"}, (6.0, 6.0)),
        ({"dataset": "cifar100", "recipe": "fast", "search_by": "trials"}, (6.0, 6.0)),
        ({"dataset": "cifar100", "recipe": "fast", "kd_weight": 2.0}, (2.0, 2.0)),
        ({"dataset": "cifar100", "recipe": "fast", "kd_weight": 2.0, "reviewkd_weight": 20.0}, (2.0, 20.0)),
        ({"dataset": "digits", "recipe": "fast"}, (3.0, 6.0)),
        ({"dataset": "folder"}, (12.0, 1.0)),
        ({"dataset": "folder", "recipe": "fast"}, (12.0, 1.0)),
        ({"dataset": "folder", "search_by": "trials"}, (1.0, 1.0)),
    ],
)
def test_the_weights_that_a_recipe_brings(flags, weights):
    filled = fill(Config(**flags))
    assert (filled.kd_weight, filled.reviewkd_weight) == weights


@pytest.mark.parametrize("student", ["ShuffleV1", "shufflev1", "cifar:SHUFFLEV1"])
def test_a_recipe_knows_a_network_by_any_of_its_names(student):
    filled = fill(Config(dataset="cifar100", teacher="cifar:WRN_40_2", student=student))
    assert (filled.lr, filled.reviewkd_weight) == (0.02, 5.0)


def test_an_unknown_schedule():
    with pytest.raises(UserError, match="unknown schedule 'linear'"):
        Recipe(3, sched="linear")
