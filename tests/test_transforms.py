"""Maps that are resized, and a convolution of a resized map without the resized map."""

import pytest
import torch
import torch.nn.functional as F

from distpro.transforms import ResizedConv2d, create_transform, resize

SIZES = [  # of the student's and of the teacher's map, and the stride of the transposed convolution
    ((5, 4), (5, 4), 1),
    ((5, 4), (10, 8), 2),
    ((5, 4), (15, 12), 3),
    ((5, 4), (20, 16), 4),
    ((5, 4), (25, 20), 1),  # no small factor: resized first
    ((1, 1), (8, 8), 4),  # a pooled feature: resized to 2x2, then four times
    ((3, 4), (12, 8), 2),  # more in one direction than in the other
    ((7, 7), (56, 56), 4),
    ((8, 8), (4, 4), 1),
    ((5, 4), (7, 9), 1),
    ((7, 9), (3, 5), 1),  # bins that overlap
    ((4, 8), (8, 4), 1),
]


def block(source, size, dtype=torch.float64):
    torch.manual_seed(0)
    return ResizedConv2d(3, 6, source, size).to(dtype)


def weights(small, large):
    """`[small or large]` from `[large or small]`: each pixel's own, or the mean of all that touch it."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        first, last = i * small // large, -(-(i + 1) * small // large)
        matrix[i, first : last if large < small else first + 1] = 1
    return matrix / matrix.sum(1, keepdim=True)


def resized(x, size):
    rows, columns = (weights(a, b).to(x.dtype) for a, b in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.T


def plain(conv, x, size):
    return F.conv2d(resized(x, size), conv.weight.to(x.dtype), padding=1)


@pytest.mark.parametrize(("source", "size", "stride"), SIZES)
def test_a_smaller_map_is_made_of_means_and_a_larger_one_of_copies(source, size, stride):
    x = torch.randn(2, 3, *source, dtype=torch.float64)
    torch.testing.assert_close(resize(x, size), resized(x, size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", "ABCDET")
def test_a_block_is_what_it_says(kind):
    """Layer by layer, with sides and channels of which no two are alike."""
    torch.manual_seed(0)
    student, teacher = (9, 6, 4), (14, 12, 8)
    block = create_transform(kind, student, teacher).double().eval()
    x = torch.randn(2, *student, dtype=torch.float64)
    convs = [m.weight for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
    wide = lambda y, weight: F.conv2d(F.interpolate(y, teacher[1:]), weight, padding=1)  # noqa: E731
    norm = lambda y: y / (1 + 1e-5) ** 0.5  # noqa: E731
    if kind == "A":
        want = F.interpolate(norm(F.conv2d(x, convs[0])), teacher[1:])
    elif kind == "T":
        y = F.conv2d(x, convs[0], block[0].bias).permute(0, 2, 3, 1)
        want = F.interpolate(F.layer_norm(y, (14,)).permute(0, 3, 1, 2), teacher[1:])
    elif kind == "D":
        y = F.relu(norm(F.conv2d(x, convs[0], padding=1)))
        y = F.relu(norm(F.conv2d(y * F.conv2d(y, convs[1]), convs[2], padding=1)))
        want = norm(wide(y, convs[3]))
    else:
        y = norm(F.conv2d(x, convs[0]))
        y = y if kind == "E" else y * F.conv2d(y, convs[1])
        y = norm(wide(y, convs[1 if kind == "E" else 2]))
        want = norm(F.conv2d(y, convs[3], padding=1)) if kind == "C" else y
    torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)
    for weight in convs:
        if weight.shape[0] > 1:  # He-normal over the fan-out; the attention's is left as it was
            assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5, rel=0.25)


@pytest.mark.parametrize("kind", "ABCDE")
def test_every_pixel_of_a_large_map_reaches_a_small_one(kind):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    create_transform(kind, (4, 8, 8), (6, 1, 1))(x).square().sum().backward()
    assert (x.grad != 0).all(1).float().mean() > 0.99


@pytest.mark.parametrize(("source", "size", "stride"), SIZES)
def test_it_equals_resize_and_convolution(source, size, stride):
    conv = block(source, size)
    assert conv.factor == stride
    x = torch.randn(2, 3, *source, dtype=torch.float64, requires_grad=True)
    ours, theirs = conv(x), plain(conv, x, size)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(theirs)
    inputs = (x, conv.weight)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
    conv = block((2, 2), (4, 4))
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    call = lambda x, weight: torch.func.functional_call(conv, {"weight": weight}, (x,))  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, conv.weight))


@pytest.mark.parametrize("size", [(12, 12), (24, 24), (10, 14), (6, 6), (3, 3)])
def test_images_of_another_size(size):
    conv = block((6, 6), (12, 12))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x, size), plain(conv, x, size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_bfloat16_weights_are_summed_before_they_are_rounded(layout):
    conv = block((8, 8), (32, 32), torch.float32)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv(x), plain(conv, x, (32, 32))
    exact = plain(conv.double(), x.double(), (32, 32))
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=layout)
    error, its = ((y.double() - exact).norm() / exact.norm() for y in (ours, theirs))
    assert error < 1.1 * its < 1e-2


def test_the_weights_are_those_of_a_convolution():
    conv = block((4, 4), (8, 8))
    assert {name: tuple(value.shape) for name, value in conv.state_dict().items()} == {"weight": (6, 3, 3, 3)}
