"""timm's families, each as student and as teacher: what is read is the network's own, and it trains and searches."""

import copy

import pytest
import torch

from distpro import Distiller
from distpro.errors import UserError
from distpro.features import Features, Teacher
from distpro.models import create_model
from distpro.search_step import SearchStep

CLASSES = 7
# the smallest of each family, and images as small as it takes
MAPS = {
    "convnext_atto": 32,
    "convnextv2_atto": 32,
    "cs3darknet_focus_s": 32,
    "densenet121": 32,
    "dla46_c": 32,
    "dpn48b": 32,
    "edgenext_xx_small": 64,
    "efficientnet_b0": 32,
    "ese_vovnet19b_slim": 32,
    "fastvit_t8": 32,
    "ghostnet_050": 32,
    "hrnet_w18_small": 32,
    "inception_next_atto": 32,
    "mambaout_femto": 32,
    "mnasnet_small": 32,
    "mobilenetv1_100": 32,
    "mobilenetv2_050": 32,
    "mobilenetv3_small_050": 32,
    "mobileone_s0": 32,
    "nfnet_l0": 32,
    "poolformer_s12": 32,
    "regnetx_002": 32,
    "repvgg_a0": 32,
    "repvit_m0_9": 32,
    "res2net50_14w_8s": 32,
    "resnest14d": 32,
    "resnet18": 32,
    "resnetv2_18": 32,
    "resnext50_32x4d": 32,
    "rexnet_100": 32,
    "starnet_s1": 32,
    "tinynet_e": 32,
    "vgg11_bn": 32,
}
TOKENS = {
    "beit_base_patch16_224": 32,
    "cait_xxs24_224": 32,
    "coat_lite_tiny": 32,
    "crossvit_9_240": 240,
    "deit3_small_patch16_224": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "deit_tiny_patch16_224": 32,
    "efficientformerv2_s0": 32,
    "efficientvim_m1": 64,
    "efficientvit_b0": 32,
    "efficientvit_m0": 64,
    "levit_128s": 32,
    "maxvit_pico_rw_256": 32,
    "mixer_s32_224": 64,
    "mobilevit_xxs": 32,
    "pit_ti_224": 32,
    "pvt_v2_b0": 32,
    "sequencer2d_s": 32,
    "swiftformer_xs": 32,
    "swin_tiny_patch4_window7_224": 32,
    "swinv2_tiny_window8_256": 32,
    "tiny_vit_5m_224": 64,
    "vit_tiny_patch16_224": 32,
    "volo_d1_224": 32,
    "xcit_nano_12_p16_224": 32,
}
FAMILIES = [(name, size, "E") for name, size in MAPS.items()] + [(name, size, "T") for name, size in TOKENS.items()]


def network(name, size):
    torch.manual_seed(0)
    return create_model(f"timm:{name}", CLASSES, image_size=size)


def images(size, count=4, dtype=torch.float32):
    return torch.randn(count, 3, size, size, dtype=dtype), torch.randint(CLASSES, (count,))


def times_run(model):
    """How often each BN has seen a batch."""
    return {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}


def a_train_step(student, teacher, size, kind):
    """Everything that one step must keep, and everything that it must move."""
    distiller = Distiller(student, teacher, image=(3, size, size), transforms=kind, pathways="review", pooled=True)
    keys = list(student.state_dict())
    taught = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    first = next(p for p in student.parameters() if p.ndim == 4)
    before = first.detach().clone()
    losses_by_pathway = []
    distiller.method.paths.register_forward_hook(lambda module, inputs, output: losses_by_pathway.append(output[1]))
    distiller.train()
    teacher.train()  # as a user's own loop might
    seen = times_run(student)
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=1e-3)
    losses = distiller(*images(size), progress=1.0)
    losses["loss"].backward()
    optimizer.step()

    assert losses["loss"].isfinite()
    assert len(losses_by_pathway[0]) == len(distiller.method.paths) >= 6
    assert (losses_by_pathway[0] > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
    assert first.grad.abs().sum() > 0
    assert not torch.equal(first, before)
    assert times_run(student) == {count + 1 for count in seen}
    assert list(student.state_dict()) == keys
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(buffer, taught[name]) for name, buffer in teacher.named_buffers())
    return distiller


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "kind"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_a_family_teaches_and_learns(name, size, kind):
    net = network(name, size)
    reader = Teacher(net, (3, size, size), pooled=True)
    x, _ = images(size, 2)
    whole = reader(x)
    with torch.no_grad():
        torch.testing.assert_close(whole.logits, net(x))
    cut = reader(x, 2)
    assert len(cut.maps) == 2
    assert all(torch.equal(a, b) for a, b in zip(cut.maps, whole.maps, strict=False))
    a_train_step(network("resnet10t", size), net, size, kind)
    a_train_step(net, network("resnet10t", size), size, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnext_atto", 32),
        ("efficientvit_b0", 32),
        ("levit_128s", 32),
        ("mobilenetv3_small_050", 32),
        ("mobilevit_xxs", 32),
        ("pvt_v2_b0", 32),
        ("swin_tiny_patch4_window7_224", 32),
        ("vit_tiny_patch16_224", 32),
    ],
)
def test_a_family_is_searched_for(name, size):
    """The exact hypergradient of one search step is what finite differences tend to, with the same dropped paths."""
    image, dtype = (3, size, size), torch.float64
    teacher = network("resnet10t", size).to(dtype)
    net = network(name, size).to(dtype)
    train, val = images(size, dtype=dtype), images(size, dtype=dtype)
    found = {}
    for how in ("exact", "finite-difference"):
        torch.manual_seed(1)
        options = {"transforms": "E", "pathways": "same", "pooled": True, "warm_up": 0.0}
        distiller = Distiller(copy.deepcopy(net), teacher, image=image, **options).train()
        parameters = distiller.trainable_parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
        step = SearchStep(distiller, optimizer, [val], steps=1, hypergradient=how, radius=1e-5)
        step(*train, 1.0)
        found[how] = step.z.grad
    exact = found["exact"]
    assert exact.isfinite().all()
    assert (exact != 0).all()
    bound = 0.02 if name == "efficientvit_b0" else 1e-5  # its attention is float32 whatever it is given
    assert (exact - found["finite-difference"]).norm() < bound * exact.norm()


@pytest.mark.parametrize(
    "name",
    ["dla46_c", "efficientvit_m0", "deit_tiny_distilled_patch16_224"],
    ids=["convolution", "norm-before-it", "two"],
)
def test_an_unusual_classifier_is_run_whole_and_once(name):
    net = network(name, 64)
    x, _ = images(64)
    reader = Features(net, (3, 64, 64), pooled=True).train()
    feature = reader(x).maps[-1]
    assert feature.shape == (4, net.num_features, 1, 1)
    assert times_run(net) <= {1}
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_var.fill_(2.0)  # a norm left out would show
    reader.eval()
    torch.testing.assert_close(reader(x).logits, net(x))


def test_what_timm_cannot_do_is_one_sentence():
    with pytest.raises(UserError, match=r"^EfficientFormer does not run on images of shape \[3, 64, 64\]: .*size"):
        Features(network("efficientformer_l1", 64), (3, 64, 64))  # only for images of 224 x 224
    with torch.device("meta"):
        encoder = network("mobilenetv5_300m_enc", 64)
        with pytest.raises(UserError, match=r"^MobileNetV5Encoder does not run on .* not support classification"):
            Features(encoder, (3, 64, 64))
        with pytest.raises(UserError, match=r"^MobileNetV5Encoder has no classifier, so there is no pooled feature"):
            Features(encoder, (3, 64, 64), pooled=True)
