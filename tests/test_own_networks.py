"""Networks as researchers bring them: whole, wrapped, compiled, or read by the names of their layers."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from own import IMAGE, Plain, batch, networks
from torch import nn

from distpro import Distiller, Features, Recipe, distill
from distpro.errors import UserError
from distpro.layers import as_map
from distpro.models import create_model

# -- networks -----------------------------------------------------------------------------------------------------


def test_a_compiled_network_is_refused_where_its_maps_are_read():
    student, teacher = networks()
    compiled = torch.compile(student, backend="eager")
    with pytest.raises(UserError, match=r"is compiled.*give the plain network \(Distiller\(\.\.\., compile=True\)"):
        Distiller(compiled, teacher, image=IMAGE)
    teacher.compile(backend="eager")
    with pytest.raises(UserError, match="ResNet is compiled"):
        Distiller(student, teacher, image=IMAGE)
    x, y = batch()
    got = Distiller(compiled, teacher, image=IMAGE, method="kd").eval()(x, y)  # reads logits, by their own forward
    want = Distiller(*networks(), image=IMAGE, method="kd").eval()(x, y)
    torch.testing.assert_close(got["loss"], want["loss"])


def test_a_network_in_data_parallel_is_told_where_that_belongs():
    student, teacher = networks()
    with pytest.raises(UserError, match="in a DataParallel: pass the plain one, and wrap the Distiller"):
        Distiller(nn.DataParallel(student), teacher, image=IMAGE)


def test_teacher_and_student_are_two():
    student, teacher = networks()
    with pytest.raises(UserError, match=r"share trainable parameters: copy.deepcopy"):
        Distiller(student, student, image=IMAGE)
    student.fc = teacher.fc = nn.Linear(64, 10).requires_grad_(False)  # as SimKD has it
    student.forward_head(torch.zeros(1, 64, 4, 4))
    Distiller(student, teacher, image=IMAGE)


def test_logits_beside_others_in_a_tuple_want_a_loss_each():
    from torchvision.models.googlenet import GoogLeNetOutputs

    class Several(Plain):
        def forward(self, x):
            logits = super().forward(x)
            return GoogLeNetOutputs(logits, logits, logits) if self.training else logits

    features = Features(Several(), IMAGE, ["conv"]).train()
    with pytest.raises(UserError, match="Several gives a GoogLeNetOutputs"):
        features(batch()[0])


def test_logits_in_an_object():
    class Wrapped(Plain):
        def forward(self, x):
            output = OrderedDict(logits=super().forward(x))
            return type("ModelOutput", (), dict(output))()

    torch.manual_seed(0)
    student = Wrapped()
    x, y = batch()
    losses = Distiller(student, create_model("resnet8", 10), image=IMAGE, method="kd").eval()(x, y)
    torch.testing.assert_close(losses["task"], F.cross_entropy(student(x).logits, y))


def test_a_forward_beside_the_parts_that_are_read_is_seen():
    student = networks()[0]
    plain = type(student).forward
    own = type("Scaled", (type(student),), {"forward": lambda self, x: 2 * plain(self, x)})
    student.__class__ = own
    with pytest.raises(UserError, match="Scaled gives other logits by its forward than by forward_intermediates"):
        Features(student, IMAGE)
    nn.init.normal_(student.fc.weight, std=1e-6)  # as small as those of some networks of timm
    nn.init.zeros_(student.fc.bias)
    with pytest.raises(UserError, match="Scaled gives other logits"):
        Features(student, IMAGE)
    assert Features(student, IMAGE, maps=False).classes == 10
    own.forward = lambda self, x: plain(self, x) + torch.randn(10)  # one that samples is not like itself either
    Features(student, IMAGE)


@pytest.mark.parametrize("image", [64, (16, 16), [3, 16.0, 16]])
def test_the_shape_of_an_image(image):
    with pytest.raises(UserError, match=r"expected the shape \(C, H, W\) of one image"):
        Distiller(*networks(), image=image)
    with pytest.raises(UserError, match=r"expected the shape \(C, H, W\) of one image"):
        distill(*networks(), [batch()], Recipe(1), image=image)


# -- named layers -------------------------------------------------------------------------------------------------


def test_an_overwritten_layer_is_refused():
    assert Features(Plain(inplace=False), IMAGE, ["conv"]).shapes == [(6, 8, 8)]
    assert Features(Plain(inplace=True), IMAGE, ["relu"]).shapes == [(6, 8, 8)]
    with pytest.raises(UserError, match=r"layer 'conv' of Plain is overwritten in place.*ReLU\(inplace=True\)"):
        Features(Plain(inplace=True), IMAGE, ["conv"])


def test_what_is_overwritten_in_training_alone_is_seen_there():
    student = Plain()
    student.relu = nn.Dropout(0.5, inplace=True)
    features = Features(student, IMAGE, ["conv"])
    with torch.inference_mode():
        assert len(features.eval()(batch()[0]).maps) == 1
    with pytest.raises(UserError, match="layer 'conv' of Plain is overwritten in place"):
        features.train()(batch()[0])


def test_a_forward_that_fails_leaves_nothing_behind():
    student = Plain()
    features = Features(student, IMAGE, ["conv"])
    student.skip = property  # any value that is true
    fc, student.fc = student.fc, nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        features(batch()[0])
    student.fc = fc
    student(batch()[0])
    copy.deepcopy(features)
    with pytest.raises(UserError, match="a layer is named twice: conv fc conv"):
        Features(student, IMAGE, ["conv", "fc", "conv"])


def test_a_layer_that_is_skipped_later_is_no_old_map():
    features = Features(Plain(), IMAGE, ["conv", "extra"])
    features(batch()[0])
    features.model.skip = True
    with pytest.raises(UserError, match="layer 'extra' of Plain was not run"):
        features(batch()[0])


@pytest.mark.parametrize(
    ("shape", "image", "read"),
    [
        ((6, 8, 8), (16, 16), "as it is"),
        ((8, 8, 12), (16, 16), "last"),  # Swin's blocks
        ((8, 8, 1), (16, 16), "as it is"),  # a pool over rows
        ((64, 64, 32), (128, 128), "as it is"),  # a stride of its own for each side
        ((8, 8, 8), (16, 16), "as it is"),  # in doubt
        ((6, 8, 4), (32, 16), "as it is"),
        ((8, 4, 9), (32, 16), "last"),
        ((3, 7, 10), (200, 300), "as it is"),  # 6.25 and 9.4 rounded up
        ((5, 3, 4), (16, 16), "as it is"),  # of no proportions: a map all the same
    ],
)
def test_maps_with_channels_last_show_by_their_proportions(shape, image, read):
    x = torch.randn(2, *shape)
    want = x if read == "as it is" else torch.einsum("nhwc->nchw", x)
    assert torch.equal(as_map(x, image, "layer"), want)


def test_tokens_of_images_that_are_not_square():
    x = torch.randn(2, 16, 5)
    got = as_map(x, (64, 16), "layer")  # 16 is a square number, the image is none
    assert got.shape == (2, 5, 8, 2)
    assert torch.equal(got[:, :, 3, 1], x[:, 7])
    torch.testing.assert_close(as_map(torch.cat([x[:, :1], x], 1), (64, 16), "layer"), got)  # a class token before them
    assert as_map(x[:, :4], (16, 48), "layer").shape == (2, 5, 1, 3)  # not 1 x 4
    for tokens, image in ((18, (16, 16)), (16, (48, 16)), (0, (16, 16)), (1, (48, 16)), (80, (80, 240))):
        with pytest.raises(UserError, match=rf"layer layer gives \[2, {tokens}, 5\]: expected .* tokens"):
            as_map(torch.randn(2, tokens, 5), image, "layer")


def test_a_network_whose_layers_are_read_is_copied_after_a_pass_of_its_own():
    from timm.utils import ModelEmaV3

    student = Plain()
    distiller = Distiller(student, networks()[1], image=IMAGE, student_layers=["conv"])
    student(batch()[0])  # leaves a map of the autograd graph behind, if hooks keep it
    twin = copy.deepcopy(student)
    ModelEmaV3(distiller).update(distiller)
    x, y = batch()
    assert torch.equal(twin.eval()(x), student.eval()(x))
    assert distiller(x, y, progress=1.0)["pathways"] > 0
