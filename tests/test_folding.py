"""A folded network says what the network says."""

import pytest
import torch
from torch import nn

from distpro.features import Teacher
from distpro.folding import folded
from distpro.models import create_model
from distpro.models.zoo import ZOO
from distpro.precision import Precision


def shaken(model):
    """BN as after a training: statistics and affine parameters at random, gammas of either sign."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator).mul_(0.3)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                nn.init.normal_(module.weight, 0, 1, generator)
                nn.init.normal_(module.bias, 0, 1, generator)
    return model


def check(model, image, run=None):
    """Folds, compares logits and maps in float64, and gives the count."""
    model = shaken(model).double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, *image, dtype=torch.float64)

    def read(network):
        if run:
            return run(network, x)
        final, maps = network.forward_intermediates(x)
        return [network.forward_head(final), *maps]

    twin, count = folded(model, read)
    with torch.no_grad():
        for got, want in zip(read(twin), read(model), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(len(m._forward_hooks) for m in twin.modules())
    return count


# resnet20: the stem, two a block, and two strided shortcuts. wrn_16_2: the stem (the first block widens, so that its
# shortcut reads what follows the BN) and conv1 of each of 6 blocks; a BN after an addition reads no convolution.
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 1 + 2 * 9 + 2), ("wrn_16_2", 1 + 6)])
def test_how_many(name, expected):
    assert check(create_model(name, 10), (3, 32, 32)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_zoo(name):
    check(create_model(name, 10), (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "some"),
    [("timm:resnet18", 20), ("timm:efficientnet_lite0", 30), ("timm:densenet121", 1), ("timm:vit_tiny_patch16_224", 0)],
)
def test_networks_of_timm(name, some):
    size = 224 if "vit" in name else 64
    assert check(create_model(name, 10, image_size=size), (3, size, size)) >= some


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: [m.bn(m.conv(x))], 1),
        (lambda m, x: [m.bn(y := m.conv(x)) + y], 0),  # the convolution is used besides
        (lambda m, x: [m.bn(y := m.conv(x)), y], 0),  # or returned
        (lambda m, x: [m.bn(m.conv(x).relu())], 0),
        (lambda m, x: [m.bn(m.conv(x)), m.bn(m.conv(x + 1))], 0),  # shared weights
        (lambda m, x: [m.bn(y := m.conv(x)), y.flatten(1)], 0),  # a view of it is returned
    ],
)
def test_only_what_a_bn_alone_reads_is_folded(forward, expected):
    torch.manual_seed(0)
    assert check(Small(), (3, 8, 8), forward) == expected


def test_no_bn_without_running_statistics():
    torch.manual_seed(0)
    model = Small()
    model.bn = nn.BatchNorm2d(4, track_running_stats=False)
    assert check(model, (3, 8, 8), lambda m, x: [m.bn(m.conv(x))]) == 0


@pytest.mark.parametrize("layer", ["layer2.0.conv1", "layer2.0.bn1", "layer3"])
def test_a_layer_read_by_name(layer):
    model = shaken(create_model("resnet20", 10))
    x = torch.randn(2, 3, 32, 32)
    want = Teacher(model, (3, 32, 32), [layer])(x)
    reader = Teacher(model, (3, 32, 32), [layer], precision=Precision(teacher=torch.float32))
    folds = sum(isinstance(m, nn.BatchNorm2d) for m in reader.modules())
    assert folds == ("conv1" in layer)  # all are gone but the one whose convolution is read
    torch.testing.assert_close(reader(x).maps[0], want.maps[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reader(x).logits, want.logits, rtol=1e-4, atol=1e-4)


class Joined(nn.Module):
    """A convolution and a BN that has one name or two, and is called by its last one or past them."""

    def __init__(self, conv, bn, two=True, past=False):
        super().__init__()
        self.conv, self.bn, self.listed = conv, bn, [bn]
        self.again = nn.Sequential(bn) if two else None
        self.past = past

    def forward(self, x):
        return (self.listed[0] if self.past else self.again or self.bn)(self.conv(x))


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return 3 * super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("conv", "bn", "options", "count"),
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), {"two": False}, 1),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), {}, 1),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), {"past": True}, 0),
        (nn.Conv2d(3, 4, 3), Louder(4), {}, 0),
        (Standardised(3, 4, 3), nn.BatchNorm2d(4), {}, 0),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), {}, 0),
    ],
    ids=["plain", "two names", "past its name", "own BN", "standardised", "parametrised"],
)
def test_what_cannot_be_folded_stays_as_it_is(conv, bn, options, count):
    assert check(Joined(conv, bn, **options), (3, 9, 9), run=lambda network, x: [network(x)]) == count
