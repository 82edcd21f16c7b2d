"""Small images kept on the device, where whole batches are cropped, flipped and normalised at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graphs import CaptureError, CudaGraphs, Graphs
from ..precision import to_device
from .base import Batch, Loader, Split, generator


@dataclass(frozen=True)
class Augmentation:
    """How stored images become network input; `mean` and `std` per channel are of values divided by `peak`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int  # random shift by up to this many pixels, padded with zeros
    flip: bool  # horizontally, half of the images
    image_size: int | None = None  # resize to this side after the crop; None keeps the size
    peak: float = 255.0
    alternate: bool = False  # flip each image in every other epoch, so that two epochs show it both ways


@dataclass(frozen=True, eq=False)
class Resident(Split):
    """A split in memory, uint8 [N, C, H + 2p, W + 2p]: images padded by p = `augmentation.padding` zeros."""

    padded: Tensor
    labels: Tensor
    augmentation: Augmentation
    graphs: bool = True  # on a GPU, make batches by CUDA graphs

    @staticmethod
    def of(
        images: Tensor, labels: Tensor, augmentation: Augmentation, device: torch.device, graphs: bool = True
    ) -> Resident:
        """`images` uint8 [N, C, H, W] with `labels` int64 [N], moved to `device`."""
        return Resident(F.pad(images.to(device), [augmentation.padding] * 4), labels, augmentation, graphs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of the batches."""
        channels, height, width = self.padded.shape[1:]
        size, frame = self.augmentation.image_size, 2 * self.augmentation.padding
        return (channels, size, size) if size else (channels, height - frame, width - frame)

    def sized(self, side: int) -> Resident:
        return replace(self, augmentation=replace(self.augmentation, image_size=side))

    def _take(self, rows: Tensor) -> Resident:
        return replace(self, padded=self.padded[rows.to(self.padded.device)], labels=self.labels[rows])

    def loader(
        self, batch_size: int, *, shuffle: bool, augment: bool, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        return ResidentLoader(self, batch_size, shuffle, augment, seed, drop_last)


class ResidentLoader(Loader):
    """Batches of a `Resident` split, on its device."""

    def __init__(
        self, split: Resident, batch_size: int, shuffle: bool, augment: bool, seed: int, drop_last: bool
    ) -> None:
        super().__init__(len(split), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        augmentation, device = split.augmentation, split.padded.device
        self._padded, self._labels, self._augment = split.padded, split.labels.to(device), augment
        self._augmentation = augmentation if augment else replace(augmentation, flip=False)
        mean, std = (
            torch.tensor(value, device=device).view(-1, 1, 1) for value in (augmentation.mean, augmentation.std)
        )
        self._first = torch.randint(2, (len(split),), generator=generator(seed)) if augmentation.alternate else None
        self._scale, self._shift = 1 / (augmentation.peak * std), -mean / std
        # On a GPU a CUDA graph makes batches of one size. Each replay writes to the same memory: results are cloned.
        captured = split.graphs and drop_last and device.type == "cuda"
        self._graphs = Graphs(CudaGraphs(device)) if captured else None

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        for step, rows in self._plan_of_all(epoch, start):
            key = (self._seed, epoch, step) if self._augment else None
            draws = draw(rows, self._augmentation, key, self._first)[:, self._rank :: self._ranks].contiguous()
            yield self._make(draws)

    def _make(self, draws: Tensor) -> Batch:
        if self._graphs is not None:
            try:
                x, y = self._graphs((), self._batch, draws)
                return x.clone(), y.clone()
            except CaptureError as error:
                self._graphs = None
                warnings.warn(f"batches are made without CUDA graphs: {error}", stacklevel=2)
        return self._batch((), to_device(draws, self._padded.device))

    def _batch(self, key: tuple[()], draws: Tensor) -> Batch:
        """Network input and labels for `draws` [4, N]; runs on the device alone."""
        x = window(self._padded, draws, self._augmentation).float()
        size = self._augmentation.image_size
        if size not in (None, x.shape[-1]):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return x.mul_(self._scale).add_(self._shift), self._labels[draws[0]]


def draw(
    rows: Tensor, augmentation: Augmentation, key: tuple[int, int, int] | None, first: Tensor | None = None
) -> Tensor:
    """What a batch is made of, int64 [4, N]: row, top and left in the padded image, flip (0 or 1).

    The numbers depend only on `key` = (seed, epoch, step), not on the device; without a key the middle is cropped
    and nothing flipped. first: [M], whether each image is flipped in epoch 0, if flips alternate.
    """
    count, pad = len(rows), augmentation.padding
    draws = torch.stack([rows, *torch.full((2, count), pad), torch.zeros_like(rows)])
    if key is not None:
        random = generator(*key)
        draws[1:3] = torch.randint(2 * pad + 1, (2, count), generator=random)
        if augmentation.flip:
            draws[3] = torch.randint(2, (count,), generator=random) if first is None else (first[rows] + key[1]) % 2
    return draws


def window(padded: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """The images of a batch, uint8 [N, C, H, W], from `padded` [M, C, H + 2p, W + 2p] by `draws` [4, N].

    Equivalent to: padded[row, :, top : top + H, left : left + W], flipped if flip is 1, for each image.
    All crops are one indexed read from a view of all possible windows, and nothing waits for the device, so that
    a CUDA graph can capture it.
    """
    row, top, left, flip = draws
    height, width = (side - 2 * augmentation.padding for side in padded.shape[2:])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [M, C, 2p + 1, 2p + 1, H, W], nothing copied
    x = windows[row, :, top, left]
    return torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(3), x) if augmentation.flip else x
