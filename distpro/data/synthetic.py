"""One batch of noise, repeated: what a job costs without loading data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Batch, Dataset, Loader, Request, Split

CLASSES, TRAIN, TEST = 1000, 1_281_167, 2_000  # ImageNet's, except for the number of test images


@dataclass(frozen=True, eq=False)
class Synthetic(Split):
    """Noise images `[C, H, W]` with evenly distributed labels."""

    labels: Tensor
    shape: tuple[int, int, int]
    request: Request

    def sized(self, side: int) -> Synthetic:
        return replace(self, shape=(self.shape[0], side, side))

    def _take(self, rows: Tensor) -> Synthetic:
        return replace(self, labels=self.labels[rows])

    def loader(
        self, batch_size: int, *, shuffle: bool, augment: bool, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        return SyntheticLoader(self, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


class SyntheticLoader(Loader):
    """The same batch at every step; the last one of an epoch may be shorter."""

    def __init__(self, split: Synthetic, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        super().__init__(len(split), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        request = split.request
        count = min(batch_size, len(split))
        x = torch.randn(count, *split.shape, generator=torch.Generator().manual_seed(seed)).to(request.dtype)
        layout = torch.channels_last if request.channels_last else torch.contiguous_format
        self._x = x.to(request.device, memory_format=layout)
        self._y = split.labels[torch.linspace(0, len(split) - 1, count).long()].to(request.device)

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        for _, rows in self._plan(epoch, start):
            yield self._x[: len(rows)], self._y[: len(rows)]


def synthetic(request: Request) -> Dataset:
    """As many classes and training images as ImageNet has, 224x224 unless `image_size` says otherwise."""
    size = request.image_size or 224
    names = tuple(map(str, range(CLASSES)))
    train, test = (Synthetic(torch.arange(count) % CLASSES, (3, size, size), request) for count in (TRAIN, TEST))
    return Dataset("synthetic", CLASSES, names, (3, size, size), train, test)
