"""Reading networks: stages and shapes found by themselves, and nothing of the network moved."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from distpro import Distiller
from distpro.errors import UserError
from distpro.features import Features, Output, Teacher
from distpro.models import create_model
from distpro.precision import Precision


class Own(nn.Module):
    """A user's network, with control flow that no tracer would follow."""

    def __init__(self):
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.body = nn.Conv2d(4, 8, 3, 2, 1)
        self.never = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.entry(x)
        x = self.body(x if float(x.detach().sum()) > 0 else x.relu())
        return self.head(x.mean((2, 3)))


def test_zoo_stages():
    features = Features(create_model("wrn_16_2", 100), (3, 32, 32))
    assert features.shapes == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert features.classes == 100
    pooled = Features(create_model("ShuffleV2", 10), (3, 32, 32), pooled=True)
    assert pooled.shapes == [(116, 16, 16), (232, 8, 8), (464, 4, 4), (1024, 1, 1)]
    assert pooled.stages[-1] == "pooled"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet10t", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("mobilenetv3_small_050", [(16, 16, 16), (16, 8, 8), (24, 4, 4), (288, 2, 2)]),
        ("convnext_atto", [(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)]),
        ("vit_tiny_patch16_224", [(192, 4, 4)] * 4),
    ],
)
def test_timm_stages(name, shapes):
    model = create_model(name, 7, image_size=64)
    features = Features(model, (3, 64, 64))
    if name.startswith("mobilenetv3"):
        assert [s[1:] for s in features.shapes] == [s[1:] for s in shapes]
    else:
        assert features.shapes == shapes
    x = torch.randn(2, 3, 64, 64)
    features.eval()
    torch.testing.assert_close(features(x).logits, model(x))


@pytest.mark.parametrize("name", ["ShuffleV2", "mobilenetv3_small_050", "wrn_10_1", "resnet10t"])
def test_pooled_feature_runs_every_bn_once(name):
    model = create_model(name, 7)
    features = Features(model, (3, 32, 32), pooled=True).train()
    x = torch.randn(4, 3, 32, 32)
    output = features(x)
    counts = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}, counts
    assert output.maps[-1].shape[2:] == (1, 1)
    features.eval()
    torch.testing.assert_close(features(x).logits, model(x))


def test_own_network_by_layer_names():
    model = Own()
    features = Features(model, (3, 16, 16), ["entry", "body"])
    assert features.shapes == [(4, 8, 8), (8, 4, 4)]
    x = torch.randn(2, 3, 16, 16)
    features.eval()
    output = features(x)
    torch.testing.assert_close(output.logits, model(x))
    torch.testing.assert_close(output.maps[0], model.entry(x))
    with pytest.raises(UserError, match="unknown layer of Own 'boddy': did you mean 'body'"):
        Features(model, (3, 16, 16), ["boddy"])
    with pytest.raises(UserError, match="layer 'never' of Own was not run"):
        Features(Own(), (3, 16, 16), ["never"])
    with pytest.raises(UserError, match="head gives \\[1, 5\\]"):
        Features(Own(), (3, 16, 16), ["head"])


def test_an_own_network_without_layers_has_logits_alone():
    bare = Features(Own(), (3, 16, 16), pooled=True)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(bare(x).logits, bare.model(x))
    assert (bare(x).maps, bare.shapes, bare.classes) == ([], [], 5)
    sentence = "Own has no forward_intermediates: name the layers to read, for instance entry"
    for method in ("reviewkd", "distpro"):
        with pytest.raises(UserError, match=sentence):
            Distiller(Own(), Own(), image=(3, 16, 16), method=method)
    losses = Distiller(Own(), Own(), image=(3, 16, 16), method="kd")(x, torch.tensor([1, 2]))
    assert losses["kd"] > 0


def test_a_network_must_give_logits():
    class Two(Own):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(UserError, match=r"Two gives a tuple: expected logits \[N, classes\]"):
        Features(Two(), (3, 16, 16), ["entry"])


def test_a_reader_of_layers_is_copied_and_saved():
    features = Features(Own(), (3, 16, 16), ["entry", "body"]).eval()
    x = torch.randn(2, 3, 16, 16)
    for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        for ours, theirs in zip(other(x).maps, features(x).maps, strict=True):
            assert torch.equal(ours, theirs)


def test_tokens_of_a_named_layer_become_a_map():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.embed(x.flatten(2).transpose(1, 2)).mean(1))

    features = Features(Tokens(), (3, 4, 4), ["embed"])
    assert features.shapes == [(6, 4, 4)]
    x = torch.randn(2, 3, 4, 4)
    want = torch.einsum("nchw,dc->ndhw", x, features.model.embed.weight) + features.model.embed.bias[:, None, None]
    torch.testing.assert_close(features(x).maps[0], want)


def test_the_dry_forward_moves_nothing():
    model = create_model("wrn_10_1", 10).train()
    model.block1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    Features(model, (3, 16, 16))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_teacher_never_trains():
    model = create_model("wrn_10_1", 10).train()
    teacher = Teacher(model, (3, 16, 16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher.train()
    model.train()
    output = teacher(torch.randn(4, 3, 16, 16))
    assert not output.logits.requires_grad
    assert not any(m.requires_grad for m in output.maps)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_compiles_as_one_graph():
    features = Features(create_model("wrn_10_1", 10), (3, 16, 16), ["block1", "block3"])
    x = torch.randn(2, 3, 16, 16)
    features.eval()
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x).maps, features(x).maps, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_teacher_that_begins_ahead_says_the_same():
    torch.manual_seed(0)
    device = torch.device("cuda")
    teacher = Teacher(create_model("resnet8", 10).to(device), (3, 32, 32))
    batches = torch.randn(20, 64, 3, 32, 32, device=device)
    wanted = [teacher(x) for x in batches]
    found = []
    for x in batches:
        there = teacher.ahead(x.clone())
        torch.randn(512, 512, device=device).matmul(torch.randn(512, 512, device=device))  # what the student does
        output = there()
        found.append(Output(output.logits.clone(), [m.clone() for m in output.maps]))
        del output, there  # memory that the next batch's pass takes
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip((ours.logits, *ours.maps), (theirs.logits, *theirs.maps), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "densenet121", "vgg11_bn", "mobilenetv3_small_050"])
@pytest.mark.parametrize("kind", [None, torch.bfloat16])
def test_a_cut_teacher_gives_the_same_maps(name, kind):
    torch.manual_seed(0)
    reader = Teacher(create_model(f"timm:{name}", 10), (3, 64, 64), pooled=True, precision=Precision(teacher=kind))
    x = torch.randn(2, 3, 64, 64)
    whole = reader(x).maps
    for depth in range(1, len(whole)):
        cut = reader(x, depth)
        assert len(cut.maps) == depth
        assert cut.logits.numel() == 0
        assert all(torch.equal(a, b) for a, b in zip(cut.maps, whole, strict=False))


def test_the_hooks_of_a_reader_go_with_it():
    network = Own().eval()
    x = torch.randn(2, 3, 16, 16)
    readers = [Features(network, (3, 16, 16), layers) for layers in (["entry", "body"], ["body"])]
    with pytest.raises(UserError, match="layer 'never' of Own was not run"):
        Features(network, (3, 16, 16), ["never"])
    outputs = [reader(x) for reader in readers]
    assert [len(output.maps) for output in outputs] == [2, 1]
    assert torch.equal(outputs[0].maps[1], outputs[1].maps[0])

    def hooks():
        return [len(module._forward_hooks) for module in (network.entry, network.body, network.never)]

    assert hooks() == [1, 2, 0]
    del readers[0]
    assert hooks() == [0, 1, 0]
    assert len(readers[0](x).maps) == 1
    for _ in range(3):
        Distiller(network, Own(), image=(3, 16, 16), student_layers=["body"], teacher_layers=["entry"])
    assert hooks() == [0, 1, 0]


def test_a_dropout_before_the_classifier_stays():
    """timm's LCNet has one between what forward_head gives as pre_logits and its classifier."""
    model = timm.create_model("lcnetv2_small", num_classes=10, drop_rate=0.9)
    features = Features(model, (3, 32, 32), pooled=True).train()
    x = torch.randn(2, 3, 32, 32)
    before = torch.get_rng_state()
    features(x)
    assert not torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in features.modules())
