"""Transform blocks: from a student's map to the shape of a teacher's (paper, Fig. 4)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.errors import UserError

Shape = tuple[int, int, int]  # [C, H, W] of one image or its map


Size = Sequence[int]  # [H, W]


def as_shape(image: Sequence[int]) -> Shape:
    """Return `image` as `(C, H, W)`; raise a `UserError` if it is none."""
    try:
        channels, height, width = (operator.index(side) for side in image)
    except (TypeError, ValueError):
        raise UserError(f"image {image!r}: expected the shape (C, H, W) of one image, such as (3, 224, 224)") from None
    return channels, height, width


class Resize(nn.Module):
    """`resize` to `size`, or to the size given in the call."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        return resize(x, self.size if size is None else size)


class ResizedConv2d(nn.Conv2d):
    """Equivalent to `Resize(size)` and a 3x3 convolution without bias, without storing the enlarged map.

    If pixels are repeated r times in both directions, the two are one transposed convolution of stride r, whose kernel
    of (r + 2)^2 taps holds sums of the 3x3 weights. It takes (r + 2)^2 / r^2 multiplications per output and channel
    instead of 9: 4 for r = 2, 2.25 for r = 4. Larger factors begin with a resize.
    """

    sums: Tensor

    def __init__(self, inputs: int, outputs: int, source: Size, size: Size) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.size = tuple(size)
        self.factor = next((r for r in (4, 3, 2) if _repeats(source, size, r)), 1)
        taps = torch.zeros(3, self.factor + 2)  # the kernel's taps that each weight is added to
        for i in range(3):
            taps[i, 2 - i : 2 - i + self.factor] = 1
        self.register_buffer("sums", torch.kron(taps, taps), persistent=False)  # [9, (r + 2)^2]

    def forward(self, input: Tensor, size: Size | None = None) -> Tensor:
        size = self.size if size is None else tuple(size)
        r = self.factor
        if r == 1 or not _repeats(input.shape[2:], size, r):
            return super().forward(resize(input, size))
        with torch.autocast(input.device.type, enabled=False):  # sums in the weights' precision
            kernel = self.weight.permute(1, 0, 2, 3).reshape(-1, 9) @ self.sums
        kernel = kernel.view(self.in_channels, self.out_channels, r + 2, r + 2)
        return F.conv_transpose2d(resize(input, (size[0] // r, size[1] // r)), kernel, stride=r, padding=1)


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize `[N, C, h, w]` to `[N, C, H, W]`: nearest neighbour where a side grows, mean over bins where it shrinks.

    Shrinking by nearest neighbour would keep one of the 1024 pixels of a 32x32 map for a pooled feature. The authors'
    release never shrinks a map; the paper has "an interpolation layer".
    """
    size = tuple(size)
    smaller = min(x.shape[2], size[0]), min(x.shape[3], size[1])
    if smaller != tuple(x.shape[2:]):
        x = F.adaptive_avg_pool2d(x, smaller)
    return x if smaller == size else F.interpolate(x, size, mode="nearest")


def _repeats(source: Size, size: Size, factor: int) -> bool:
    """Return whether nearest interpolation from `source` to `size` ends with repeating each pixel `factor` times."""
    return all(large % (factor * small) == 0 for small, large in zip(source, size, strict=True))


class Transform(nn.Sequential):
    """A block from a student's map to a teacher's, resized to `size` or by default to the one it was built for."""

    def forward(self, input: Tensor, size: Size | None = None) -> Tensor:
        for module in self:
            resizes = isinstance(module, (Resize, ResizedConv2d))
            input = module(input, size) if resizes else module(input)
        return input


class Attention(nn.Module):
    """`x * conv1x1(x)` with a one-channel map and no squashing (paper, Fig. 4b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[N, C, H, W]`, as in token models."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _he_normal(*modules: nn.Module) -> list[nn.Module]:
    """Reinitialise the convolutions among the modules, He-normal over the fan-out.

    The one inside `Attention` is left out: with a fan-out of one, its map, and so a square of the features, would start
    some ten times too large.
    """
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return list(modules)


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _resized_conv(inputs: int, outputs: int, s: Shape, t: Shape) -> list[nn.Module]:
    return [ResizedConv2d(inputs, outputs, s[1:], t[1:]), nn.BatchNorm2d(outputs)]


def _block_a(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(*_conv(s[0], t[0], 1), Resize(t[1:]))


def _block_b(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(*_conv(s[0], mid, 1), Attention(mid), *_resized_conv(mid, t[0], s, t))


def _block_c(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(*_conv(s[0], mid, 1), Attention(mid), *_resized_conv(mid, mid, s, t), *_conv(mid, t[0], 3))


def _block_d(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(
        *(*_conv(s[0], mid, 3), nn.ReLU(), Attention(mid)),
        *(*_conv(mid, mid, 3), nn.ReLU()),
        *_resized_conv(mid, t[0], s, t),
    )


def _block_e(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(*_conv(s[0], mid, 1), *_resized_conv(mid, t[0], s, t))


def _block_t(s: Shape, t: Shape, mid: int) -> list[nn.Module]:
    return _he_normal(nn.Conv2d(s[0], t[0], 1), ChannelNorm(t[0]), Resize(t[1:]))


# A: linear. B: one, C: two 3x3 convolutions after the attention. D: the block of the authors' release.
# E: B without the attention. T: linear + LayerNorm, for token models.
TRANSFORMS: dict[str, Callable[[Shape, Shape, int], list[nn.Module]]] = {
    "A": _block_a,
    "B": _block_b,
    "C": _block_c,
    "D": _block_d,
    "E": _block_e,
    "T": _block_t,
}


def create_transform(kind: str, student: Shape, teacher: Shape) -> Transform:
    """Create the block `kind` from a student's map `[C_s, H_s, W_s]` to a teacher's `[C_t, H_t, W_t]`.

    Its hidden width is min(512, C_t, C_s). The function in `TRANSFORMS` initialises its weights.
    """
    return Transform(*TRANSFORMS[kind](student, teacher, min(512, teacher[0], student[0])))
