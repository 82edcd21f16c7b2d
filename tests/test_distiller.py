"""A Distiller in a loop of one's own: precision, methods, tasks, loops and files."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from own import IMAGE, Plain, batch, networks
from torch import nn

from distpro import Distiller, Precision, Recipe, distill, search_by_gradient
from distpro.errors import UserError
from distpro.methods import Method
from distpro.pathways import Pathway, all_pathways
from distpro.process import Process
from distpro.transforms import TRANSFORMS

# -- precision ---------------------------------------------------------------------------------------------------


def test_an_autocast_around_the_call_holds():
    seen = []
    student, teacher = networks()
    student.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    distiller = Distiller(student, teacher, image=IMAGE, method="kd").train()
    seen.clear()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        distiller(x, y)
    distiller(x, y)
    assert seen == [torch.bfloat16, torch.float32]


def test_an_autocast_around_all_steps_hides_none_of_them():
    """It keeps the 16-bit copies of weights that are made within it, even where it is off: they would never move."""

    def losses(around):
        student, teacher = networks()
        x, y = batch()
        rows = []
        with around:
            precision = Precision(amp=torch.bfloat16)
            rows += distill(student, teacher, [(x, y)], Recipe(4, lr=0.1), method="kd", precision=precision)
        return [row["train_loss"] for row in rows]

    assert losses(torch.autocast("cpu", enabled=False)) == losses(contextlib.nullcontext())


def test_an_autocast_around_whole_trainings_is_refused():
    student, teacher = networks()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match=r"give it precision=Precision\(amp="):
        distill(student, teacher, [batch()], Recipe(1), method="kd")


def test_a_16_bit_teacher_is_made_float_with_the_rest():
    distiller = Distiller(*networks(), image=IMAGE, method="kd", precision=Precision(teacher=torch.bfloat16))
    x, y = batch()
    before = distiller(x, y)["kd"].item()
    assert distiller.float()(x, y)["kd"].item() == pytest.approx(before, rel=0.05)


# -- methods and tasks of one's own -------------------------------------------------------------------------------


class Hint(Method):
    """The mean squared distance of the logits."""

    reads_maps = False
    options = ("hint_weight",)

    def __init__(self, student, teacher, hint_weight=1.0):
        super().__init__(student, teacher)
        self.hint_weight = hint_weight

    def forward(self, student, teacher, target, moment):
        return {"hint": self.hint_weight * F.mse_loss(student.logits, teacher.logits)}


def test_a_method_of_ones_own_is_given_as_a_class():
    student, teacher = networks()
    distiller = Distiller(student, teacher, image=IMAGE, method=Hint, hint_weight=3.0).eval()
    x, y = batch()
    want = 3 * F.mse_loss(student(x), teacher(x)) + F.cross_entropy(student(x), y)
    torch.testing.assert_close(distiller(x, y)["loss"], want)
    rows = distill(student, teacher, [(x, y)], Recipe(1), method=Hint, image=IMAGE)
    assert rows[0]["train_hint"] > 0
    with pytest.raises(UserError, match="unknown option of method Hint 'hint_wieght': did you mean 'hint_weight'"):
        Distiller(student, teacher, image=IMAGE, method=Hint, hint_wieght=3.0)


def test_a_term_may_not_take_the_total_s_name():
    class Greedy(Hint):
        def forward(self, student, teacher, target, moment):
            return {"loss": student.logits.sum()}

    with pytest.raises(UserError, match="Greedy returns a term named 'loss' or 'task'"):
        Distiller(*networks(), image=IMAGE, method=Greedy)(*batch())


def test_a_method_with_moments_of_its_own_must_hear_where_it_stands():
    class Growing(Hint):
        def moment(self, progress):
            return super().moment(progress)._replace(weights=torch.tensor([progress]))

    distiller = Distiller(*networks(), image=IMAGE, method=Growing)
    with pytest.raises(UserError, match="the loss weights depend on the progress"):
        distiller(*batch())
    distiller(*batch(), progress=0.5)


def test_a_task_of_ones_own():
    student, teacher = networks()
    x, _ = batch()
    several = torch.randint(2, (4, 10)).float()
    distiller = Distiller(student, teacher, image=IMAGE, method="kd", task=nn.BCEWithLogitsLoss()).eval()
    losses = distiller(x, several)
    torch.testing.assert_close(losses["task"], F.binary_cross_entropy_with_logits(student(x), several))
    distill(student, teacher, [(x, several)], Recipe(1), method="kd", task=nn.BCEWithLogitsLoss())
    with pytest.raises(UserError, match="label_smoothing only applies to the default cross-entropy"):
        Distiller(student, teacher, image=IMAGE, method="kd", task=nn.BCEWithLogitsLoss(), label_smoothing=0.1)
    with pytest.raises(UserError, match=r"accuracy needs classes \[N\], the test targets are \[4, 10\]"):
        distill(
            student, teacher, [(x, several)], Recipe(1), method="kd", task=nn.BCEWithLogitsLoss(), test=[(x, several)]
        )

    search = {"task": nn.BCEWithLogitsLoss(), "test": [(x, several)]}
    with pytest.raises(UserError, match=r"accuracy needs classes \[N\], the test targets are \[4, 10\]"):
        search_by_gradient(student, teacher, [(x, several)], [(x, several)], Recipe(1), **search)

    class Scaled(nn.Linear):
        def forward(self, logits, target):
            return F.cross_entropy(super().forward(logits), target)

    with pytest.raises(UserError, match="Scaled has parameters, which would not be trained"):
        Distiller(student, teacher, image=IMAGE, method="kd", task=Scaled(10, 10))


def test_a_search_judges_by_the_task_without_smoothing():
    student, teacher = networks()
    x, y = batch()
    logits = student.eval()(x)
    smooth = Distiller(student, teacher, image=IMAGE, label_smoothing=0.3)
    assert smooth.validation_loss(logits, y) == F.cross_entropy(logits, y) != smooth.task(logits, y)
    weighted = nn.CrossEntropyLoss(torch.rand(10))
    own = Distiller(student, teacher, image=IMAGE, task=weighted)
    assert own.validation_loss(logits, y) == own.task(logits, y) == weighted(logits, y)
    process = search_by_gradient(student, teacher, [(x, y)], [(x, y)], Recipe(2), transforms="A", task=weighted)
    assert process.z.shape == (2, 9)


def test_mixed_labels_are_probabilities():
    student, teacher = networks()
    x, _ = batch()
    mixed = torch.rand(4, 10).softmax(1)
    task = Distiller(student, teacher, image=IMAGE, method="kd").eval()(x, mixed)["task"]
    torch.testing.assert_close(task, -(mixed * student(x).log_softmax(1)).sum(1).mean())
    distiller = Distiller(student, teacher, image=IMAGE, transforms="", logit_pathways=["DKD"])
    with pytest.raises(UserError, match=r"DKD needs class labels: expected \[N\], got \[4, 10\]"):
        distiller(x, mixed, progress=1.0)


def test_a_transform_of_ones_own_keeps_its_weights_and_its_name(monkeypatch, tmp_path):
    def zero(s, t, mid):
        conv = nn.Conv2d(s[0], t[0], 1)
        nn.init.zeros_(conv.weight)
        return [conv]

    monkeypatch.setitem(TRANSFORMS, "zero-conv", zero)
    paths = all_pathways(1, 1, ["zero-conv"])
    assert Pathway.parse(paths[0].name) == paths[0]
    Process.uniform(paths).save(tmp_path / "own.safetensors")
    process = Process.load(tmp_path / "own.safetensors")
    student = Plain()
    layers = {"student_layers": ["conv"], "teacher_layers": ["conv"]}
    distiller = Distiller(student, Plain(), image=IMAGE, transforms=["zero-conv"], process=process, **layers)
    assert not distiller.method.paths.blocks["t1-s1-zero-conv"][0].weight.any()


# -- loops and files ----------------------------------------------------------------------------------------------


def test_the_state_is_tensors_alone(tmp_path):
    from safetensors.torch import load_file, save_file

    task = nn.CrossEntropyLoss(torch.rand(10))
    distiller = Distiller(*networks(), image=IMAGE, method="reviewkd", steps=9, task=task).train()
    for _ in range(3):
        distiller(*batch())
    save_file(distiller.state_dict(), tmp_path / "all.safetensors")
    again = Distiller(*networks(), image=IMAGE, method="reviewkd", steps=9, task=nn.CrossEntropyLoss(torch.rand(10)))
    again.load_state_dict(load_file(tmp_path / "all.safetensors"))
    assert again.calls == 3


@pytest.mark.parametrize("progress", [-0.1, 1.5, 30, float("nan")])
def test_progress_is_a_share(progress):
    with pytest.raises(UserError, match=r"expected 0 \(the first step of the training\) to 1"):
        Distiller(*networks(), image=IMAGE)(*batch(), progress=progress)


def test_evaluations_after_the_last_step_are_no_training_calls():
    distiller = Distiller(*networks(), image=IMAGE, method="none", steps=1)
    distiller(*batch())
    with pytest.warns(UserWarning, match="more training calls than steps=1"):
        distiller(*batch())
    distiller.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(*batch())


def test_a_sum_of_shares_is_a_share():
    total = sum(1 / 49 for _ in range(49)) + 1e-15
    assert total > 1
    Distiller(*networks(), image=IMAGE)(*batch(), progress=total)


@pytest.mark.parametrize("method", [nn.ReLU(), 3, nn.Linear])
def test_methods_of_another_kind(method):
    with pytest.raises(UserError, match=r"expected a name \(none, kd, reviewkd, distpro\) or a subclass of Method"):
        Distiller(*networks(), image=IMAGE, method=method)


def test_smoothing_may_be_an_option_too():
    x, y = batch()
    rows = [
        distill(networks()[0], None, [(x, y)], recipe, method="none", image=IMAGE, **options)[0]["train_loss"]
        for recipe, options in (
            (Recipe(1, label_smoothing=0.2), {}),
            (Recipe(1), {"label_smoothing": 0.2}),
            (Recipe(1), {}),
        )
    ]
    assert rows[0] == rows[1] != rows[2]


def test_validation_batches_that_run_out():
    x, y = batch()

    class Once(list):
        def __iter__(self):
            while self:
                yield self.pop()

    with pytest.raises(UserError, match="the validation batches have run out"):
        search_by_gradient(*networks(), [(x, y)] * 4, Once([(x, y)] * 2), Recipe(1), image=IMAGE, transforms="A")


def test_batches_that_can_be_gone_through_once():
    class Once:
        def __init__(self):
            self.left = [batch(), batch()]

        def __len__(self):
            return 2

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    once = Once()
    with pytest.raises(UserError, match=r"a Once is its own iterator.*pass image=\(C, H, W\)"):
        distill(networks()[0], None, once, Recipe(1), method="none")
    assert len(once.left) == 2
    assert distill(networks()[0], None, once, Recipe(1), method="none", image=IMAGE)[0]["images"] == 8
    with pytest.raises(UserError, match=r"no batches left \(none, epoch 2\)"):
        distill(networks()[0], None, Once(), Recipe(2), method="none", image=IMAGE)
