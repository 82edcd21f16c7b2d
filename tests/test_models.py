"""The zoo against the published networks it stands for; models by name."""

import hashlib

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from distpro.errors import UserError
from distpro.models import create_model, list_models, normalisation

# name: maps [C, H] at 32x32, pooled channels, parameters in millions with 100 classes, and of the published
# state dict the number of entries and a digest of their names and shapes, in order (RepDistiller's networks).
NARROW, TIMES4 = [(16, 32), (32, 16), (64, 8)], [(64, 32), (128, 16), (256, 8)]
VGG = [(128, 16), (256, 8), (512, 4), (512, 4)]
PUBLISHED = {
    "wrn_40_2": ([(32, 32), (64, 16), (128, 8)], 128, 2.255, 227, "adf0a10c7ead"),
    "wrn_40_1": (NARROW, 64, 0.570, 226, "0aa607a5c1b6"),
    "wrn_28_4": (TIMES4, 256, 5.872, 155, "c23b6efd2aae"),
    "wrn_16_4": (TIMES4, 256, 2.772, 83, "0e87e0fa8bec"),
    "wrn_16_2": ([(32, 32), (64, 16), (128, 8)], 128, 0.703, 83, "264bf5a37859"),
    "wrn_16_1": (NARROW, 64, 0.181, 82, "72def0ef8fdf"),
    "wrn_10_1": (NARROW, 64, 0.084, 46, "3b80250cd4aa"),
    "resnet8": (NARROW, 64, 0.084, 56, "5449ecb61c0b"),
    "resnet14": (NARROW, 64, 0.181, 92, "e206008031b5"),
    "resnet20": (NARROW, 64, 0.278, 128, "6f54e389c35c"),
    "resnet32": (NARROW, 64, 0.473, 200, "9a7e2a11fa94"),
    "resnet44": (NARROW, 64, 0.667, 272, "caefd48710fe"),
    "resnet56": (NARROW, 64, 0.862, 344, "470885c26e17"),
    "resnet110": (NARROW, 64, 1.737, 668, "7e524b233505"),
    "resnet8x4": (TIMES4, 256, 1.234, 62, "6a4fa0192e11"),
    "resnet32x4": (TIMES4, 256, 7.434, 206, "250044a29347"),
    "ShuffleV1": ([(240, 16), (480, 8), (960, 4)], 960, 0.949, 296, "b19c4d818f21"),
    "ShuffleV2": ([(116, 16), (232, 8), (464, 4)], 1024, 1.356, 338, "8f44a58a43a9"),
    "MobileNetV2": ([(12, 16), (16, 8), (48, 4), (160, 2)], 1280, 0.813, 320, "cf2fc083e7ae"),
    "vgg8": (VGG, 512, 3.965, 37, "bff82c0f138a"),
    "vgg13": (VGG, 512, 9.462, 72, "af06ff07f75e"),
    "ResNet50": ([(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048, 23.705, 320, "699fe537c132"),
}
# One network of each family: mean |x| of each pre-activation map, the pooled feature and the logits, computed by
# the published code in float64 with the weights of `settled` on `image(32)`.
OUTPUTS = {
    "wrn_16_2": [2.0596, 4.05731, 9.03503, 3.91745, 7.31487],
    "resnet20": [3.14027, 19.152, 49.5217, 36.8948, 55.6139],
    "resnet8x4": [1.50459, 2.35295, 3.62911, 1.81982, 3.26191],
    "ShuffleV1": [3.81349, 45.7884, 179.712, 131.186, 201.854],
    "ShuffleV2": [2.89816, 26.5893, 78.6424, 54.0147, 80.1432],
    "MobileNetV2": [1.15214, 6.23391, 225.431, 1029.55, 785.498, 1289.44],
    "vgg8": [1.90331, 2.69172, 3.3462, 3.12176, 1.5207, 2.72982],
    "ResNet50": [4.3567, 36.4348, 800.672, 2898.8, 2155.68, 3508.1],
}
OWN_HEAD = ("ShuffleV2", "MobileNetV2")  # a convolution precedes their pooling
SMALL = ("wrn_10_1", "resnet8", "ShuffleV1", "ShuffleV2", "MobileNetV2", "vgg8")


def settled(net):
    """The same random weights and batch-norm statistics everywhere, in float64, eval mode."""
    draw = np.random.RandomState(0).standard_normal
    for key, value in net.double().eval().state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        noise = torch.from_numpy(draw(tuple(value.shape)))
        if key.endswith("running_var"):
            value.copy_(1 + 0.5 * noise.tanh())
        elif value.dim() > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(0.1 * noise + key.endswith("weight"))
    return net


def image(size, channels=3):
    return torch.from_numpy(np.random.RandomState(1).standard_normal((2, channels, size, size)))


class Maps(nn.Module):
    """A network whose forward is its maps."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return tuple(self.net.forward_intermediates(x, intermediates_only=True))


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def test_the_zoo_has_the_common_names():
    assert sorted(list_models()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_parameters_and_state_dict_are_the_published_ones(name):
    maps, pooled, millions, entries, digest = PUBLISHED[name]
    with torch.device("meta"):
        net = create_model(name, 100).eval()
        final, found = net.forward_intermediates(torch.empty(2, 3, 32, 32))
    assert [tuple(m.shape) for m in found] == [(2, c, h, h) for c, h in maps]
    assert net.forward_head(final).shape == (2, 100)
    assert net.forward_head(final, pre_logits=True).shape == (2, pooled)
    assert [(i["num_chs"], 32 // i["reduction"]) for i in net.feature_info] == maps
    assert all(isinstance(net.get_submodule(i["module"]), nn.Module) for i in net.feature_info)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    names = [f"{key} {list(value.shape)}" for key, value in net.state_dict().items()]
    assert len(names) == entries
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] == digest


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("wrn_10_1", ["conv1.weight", "block1.layer.0.bn1.weight", "block2.layer.0.convShortcut.weight", "bn1.bias"]),
        ("resnet8x4", ["bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias", "fc.bias"]),
        ("ShuffleV1", ["layer1.0.conv3.weight", "layer3.3.bn3.running_var", "linear.weight"]),
        ("ShuffleV2", ["layer2.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "bn2.weight", "linear.bias"]),
        ("MobileNetV2", ["conv1.0.weight", "blocks.6.0.conv.7.weight", "conv2.1.bias", "classifier.0.weight"]),
        ("vgg13", ["block0.0.weight", "block4.3.bias", "block4.4.running_mean", "classifier.weight"]),
        ("ResNet50", ["layer1.0.shortcut.0.weight", "layer4.2.conv3.weight", "linear.weight"]),
    ],
)
def test_state_dict_names_can_be_read_here_too(name, keys):
    with torch.device("meta"):
        assert set(keys) <= create_model(name, 10).state_dict().keys()


@pytest.mark.parametrize("name", OUTPUTS)
def test_maps_pooled_feature_and_logits_are_those_of_the_published_code(name):
    net = settled(create_model(name, 100))
    with torch.no_grad():
        final, maps = net.forward_intermediates(image(32))
        found = [*maps, net.forward_head(final, pre_logits=True), net.forward_head(final)]
    assert [x.abs().mean().item() for x in found] == pytest.approx(OUTPUTS[name], rel=5e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_maps_are_before_the_relu_and_stay_so(name):
    net = settled(create_model(name, 5)).float()
    x = image(16).float()
    with torch.no_grad():
        final, maps = net.forward_intermediates(x)
        logits = net.forward_head(final)
        assert final is maps[-1]
        assert all((m < 0).float().mean() > 0.05 for m in maps)
        assert torch.equal(net(x), logits)
        assert torch.equal(net.forward_head(net.forward_features(x)), logits)
        pooled = net.forward_head(final, pre_logits=True)
        assert torch.equal(net.get_classifier()(pooled), logits)
        if name not in OWN_HEAD:
            assert torch.equal(pooled, F.relu(maps[-1]).mean((2, 3)))
        # What a later layer changed in place would differ from the map as its stage left it.
        for index, full in enumerate(maps):
            last, (alone,) = net.forward_intermediates(x, indices=[index], stop_early=True)
            assert last is alone
            assert torch.equal(alone, full)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_train_pass_moves_every_batch_norm_once_and_reaches_every_weight(name):
    net = create_model(name, 5, in_chans=1).train()
    final, _ = net.forward_intermediates(torch.randn(4, 1, 8, 8))
    net.forward_head(final).square().sum().backward()
    assert {norm.num_batches_tracked.item() for norm in norms(net)} == {1}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_stop_early_runs_nothing_behind_the_wanted_stage():
    net = create_model("wrn_16_1", 5).train()
    net.forward_intermediates(torch.randn(2, 3, 8, 8), indices=[0], stop_early=True)
    ran = {name for name, module in net.named_modules() if getattr(module, "num_batches_tracked", 0) == 1}
    # The first stage's map is behind the norm with which the second begins.
    assert ran == {f"block1.layer.{i}.bn{j}" for i in (0, 1) for j in (1, 2)} | {"block2.layer.0.bn1"}


def test_a_named_block_of_a_wide_resnet_can_be_hooked():
    net, seen = create_model("wrn_16_1", 5).eval(), []
    for name in ("block1", "block2", "block3.layer.0", "block3.layer.1"):
        net.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    net(torch.randn(2, 3, 8, 8))
    assert seen == ["block1", "block2", "block3.layer.0", "block3.layer.1"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (7, 13), (33, 20)])
def test_any_image_size_passes(name, size):
    net = create_model(name, 10, in_chans=1).eval()
    final, maps = net.forward_intermediates(torch.randn(2, 1, *size))
    assert net.forward_head(final).shape == (2, 10)
    assert all(min(m.shape) > 0 and m.shape[1] == i["num_chs"] for m, i in zip(maps, net.feature_info, strict=True))


def test_vgg_pools_before_its_last_block_from_64_pixels_on():
    with torch.device("meta"):
        net = create_model("vgg8", 10)
        assert [net.forward_features(torch.empty(1, 3, n, n)).shape[-1] for n in (32, 64, 128)] == [4, 4, 8]


@pytest.mark.parametrize("indices", [None, 1, 2, 3, [0], [-1], [2, 0], (1, -1)])
def test_indices_mean_what_they_mean_in_timm(indices):
    from timm.models._features import feature_take_indices

    net = create_model("resnet8", 5).eval()
    x = torch.randn(1, 3, 8, 8)
    everything = net.forward_intermediates(x, intermediates_only=True)
    found = net.forward_intermediates(x, indices, intermediates_only=True)
    wanted = sorted(set(feature_take_indices(3, indices)[0]))
    assert [m.shape for m in found] == [everything[i].shape for i in wanted]


@pytest.mark.parametrize("indices", [0, 4, [3], [-4], []])
def test_indices_out_of_range_are_refused(indices):
    with pytest.raises(ValueError, match="expected 0 to 2"):
        create_model("resnet8", 5).forward_intermediates(torch.randn(1, 3, 8, 8), indices)


@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_differentiates_the_maps(name):
    """In float32, against a finite difference in float64."""
    net = settled(create_model(name, 5))
    x, step = image(8), 1e-7
    weights = {key: p.detach() for key, p in net.named_parameters()}
    along = {key: torch.from_numpy(np.random.RandomState(2).standard_normal(p.shape)) for key, p in weights.items()}

    def maps_at(values, x):
        return torch.func.functional_call(Maps(net), {f"net.{key}": value for key, value in values.items()}, x)

    with torch.no_grad():
        ahead = maps_at({key: p + step * along[key] for key, p in weights.items()}, x)
        slopes = [(there - here) / step for there, here in zip(ahead, maps_at(weights, x), strict=True)]
    net.float()
    single = [{key: value.float() for key, value in values.items()} for values in (weights, along)]
    _, tangents = torch.func.jvp(lambda values: maps_at(values, x.float()), (single[0],), (single[1],))
    for slope, tangent in zip(slopes, tangents, strict=True):
        assert slope.norm() > 0
        assert (slope - tangent).norm() < 1e-3 * slope.norm()


def test_names_find_the_zoo_and_timm():
    import timm

    assert type(create_model("wrn_22_3", 5)).__name__ == "WideResNet"
    for name in ("RESNET8", "shufflev1", "WRN_10_1", "cifar:vgg8", "vgg13"):
        assert type(create_model(name, 5)).__module__.startswith("distpro."), name
    with torch.device("meta"):
        ours = [create_model(name, 5) for name in ("ResNet50", "cifar:resnet50", "RESNET50")]
        theirs = [create_model(name, 5, in_chans=1) for name in ("resnet50", "timm:resnet50", "timm:vgg13")]
    assert [type(net).__module__ for net in ours] == ["distpro.models.resnet"] * 3
    assert [type(net).__module__ for net in theirs] == ["timm.models.resnet"] * 2 + ["timm.models.vgg"]
    assert timm.is_model("vgg13")  # so the zoo's own goes first
    assert ours[0].get_classifier().out_features == theirs[0].get_classifier().out_features == 5
    assert theirs[0].conv1.in_channels == 1


def test_timm_takes_the_image_size_where_it_can():
    for name in ("vit_tiny_patch16_224", "resnet18"):
        assert create_model(name, 7, image_size=32)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(UserError, match="patches of 'vit_tiny_patch16_224' are larger than the images"):
        create_model("vit_tiny_patch16_224", 7, image_size=8)


def test_one_code_path_reads_the_zoo_and_timm():
    for name in ("wrn_10_1", "resnet18"):
        net = create_model(name, 6).eval()
        x = torch.randn(2, 3, 32, 32)
        final, maps = net.forward_intermediates(x, indices=2)
        assert len(maps) == 2
        assert torch.allclose(net.forward_head(final), net(x))
        assert [m.shape[1] for m in maps] == [i["num_chs"] for i in net.feature_info[-2:]]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrn_4O_2", "unknown model 'wrn_4O_2': did you mean 'wrn_40_2'"),
        ("cifar:resnet57", "did you mean 'cifar:resnet5"),
        ("timm:resnet19", "did you mean 'timm:resnet1"),
        ("timm:wrn_40_2", "unknown model"),
        ("cifar:vit_tiny_patch16_224", "unknown model"),
        ("wrn_41_2", "no wrn_41_2: the depth is 6n . 4"),
        ("resnet50.no_such_tag", "timm cannot create 'resnet50.no_such_tag': .*tag"),
    ],
)
def test_a_name_that_is_no_model_is_one_sentence(name, says):
    with pytest.raises(UserError, match=says) as error:
        create_model(name, 10)
    assert "\n" not in str(error.value)


def test_the_zoo_has_no_pretrained_weights():
    with pytest.raises(UserError, match="'vgg13' has no published weights here"):
        create_model("vgg13", 10, pretrained=True)


def test_the_normalisation_is_that_of_the_published_weights(tmp_path):
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation("vit_base_patch16_224.augreg2_in21k_ft_in1k") == half
    assert normalisation("timm:resnet34.tv_in1k") == usual
    assert normalisation("cifar:resnet20") is normalisation("resnet20") is normalisation("resnet34.no_such") is None
    model = timm.create_model("test_resnet", num_classes=3)
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    timm.models.save_for_hf(model, tmp_path / "saved")
    assert normalisation(f"local-dir:{tmp_path / 'saved'}") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert normalisation(f"local-dir:{tmp_path / 'none'}") is None
