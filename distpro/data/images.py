"""Reading images from files: decoded, cropped and resized by worker processes, normalised on the device."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..errors import UserError
from .base import MEAN, STD, Batch, Channels, Loader, Split, hashed_seed

TRIES = 10  # random windows tried before the middle is taken, as in torchvision
Job = tuple[int, int | None]  # row of the split, and the seed of its augmentation (None: not augmented)


@dataclass(frozen=True)
class Augmentation:
    """How an image of any size becomes image_size x image_size pixels.

    Standard (ImageNet's): training resizes a random window with 8 to 100 % of the area and an aspect ratio of 3:4
    to 4:3; testing resizes the short side to image_size * 256 / 224 and crops the middle. Light, for images of at
    most 64 pixels, where such windows would leave only a few: the short side becomes image_size (most have it
    already), the middle is cropped, and training shifts it by up to image_size / 8 pixels, padded with zeros. In
    both, training flips half of the images. Pixels, in 0 to 1, are normalised by `mean` and `std` per channel.
    """

    image_size: int
    light: bool
    mean: Channels = MEAN
    std: Channels = STD

    def __call__(self, image: Image.Image, seed: int | None) -> Image.Image:
        """`image`: RGB. `seed`: None for testing."""
        size = self.image_size
        if seed is None:
            return center_crop(image, size if self.light else round(size * 256 / 224), size)
        chances = draw(seed)
        *_, x, y, flip = chances
        if self.light:
            pad = size // 8
            left, top = (int(u * (2 * pad + 1)) - pad for u in (x, y))
            image = center_crop(image, size, size).crop((left, top, left + size, top + size))  # outside is 0
        else:
            box = random_resized_crop_box(*image.size, chances)
            image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else image


def center_crop(image: Image.Image, short: int, size: int) -> Image.Image:
    """Resize the short side to `short` pixels (>= size) and crop the middle square of side `size`."""
    width, height = image.size
    if min(width, height) != short:
        width, height = (int(short * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image


def draw(seed: int) -> list[float]:
    """Random numbers for one image, uniform in [0, 1): TRIES areas, TRIES aspect ratios, left, top and flip."""
    chance = random.Random(seed)
    return [chance.random() for _ in range(2 * TRIES + 3)]


def random_resized_crop_box(width: int, height: int, chances: list[float]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random window: 8 to 100 % of the area, aspect ratio 3:4 to 4:3."""
    *_, x, y, _ = chances
    for u, v in zip(chances[:TRIES], chances[TRIES : 2 * TRIES], strict=True):
        area, shape = width * height * (0.08 + 0.92 * u), 3 / 4 * (16 / 9) ** v
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # none fits: the middle
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def size_of(file: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the file's header; UserError if it cannot be read."""
    try:
        with Image.open(os.fsdecode(file)) as image:
            return image.size
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise unreadable(file, error) from None


def decoded(file: bytes) -> Image.Image:
    """The image in `file` as RGB: greyscale, palette, CMYK and transparent ones are converted."""
    try:
        with Image.open(os.fsdecode(file)) as image:
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits per pixel, expected 8 or 16")
            if image.mode.startswith("I;16"):  # Pillow would clip values above 255
                levels = (np.asarray(image).astype(np.uint32) + 128) // 257
                return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        raise unreadable(file, error) from None


def unreadable(file: bytes, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"cannot read image '{os.fsdecode(file)}': {reason or type(error).__name__}")


@dataclass(frozen=True, eq=False)
class ImageFiles(Split):
    """A split whose images are read from their files when a batch needs them."""

    files: np.ndarray  # paths below `root` as bytes [N]: one block of memory, which worker processes share
    labels: Tensor
    root: bytes
    augmentation: Augmentation
    device: torch.device
    num_workers: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def sized(self, side: int) -> ImageFiles:
        return replace(self, augmentation=replace(self.augmentation, image_size=side))

    def _take(self, rows: Tensor) -> ImageFiles:
        return replace(self, files=self.files[rows.numpy()], labels=self.labels[rows])

    def loader(
        self, batch_size: int, *, shuffle: bool, augment: bool, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        return ImageFileLoader(self, batch_size, shuffle, augment, seed, drop_last)


@dataclass(frozen=True, eq=False)
class Reader(TorchDataset):
    """What a worker process runs: jobs in, uint8 [N, H, W, 3] out. It keeps no state from batch to batch."""

    root: bytes
    files: np.ndarray
    augmentation: Augmentation

    def __getitems__(self, jobs: list[Job]) -> Tensor | UserError:
        try:
            files = [(os.path.join(self.root, self.files[row]), seed) for row, seed in jobs]
            images = [np.asarray(self.augmentation(decoded(file), seed)) for file, seed in files]
        except UserError as error:
            return error  # raised here, it would arrive wrapped in the worker's traceback
        return torch.from_numpy(np.stack(images))


@dataclass
class Jobs:
    """The batch sampler of a `DataLoader`: yields the jobs of the next pass."""

    batches: Iterator[list[Job]] = field(default_factory=lambda: iter(()))

    def __iter__(self) -> Iterator[list[Job]]:
        return self.batches


class ImageFileLoader(Loader):
    """Batches read from files; the worker processes start with the first pass and live as long as the loader."""

    def __init__(
        self, split: ImageFiles, batch_size: int, shuffle: bool, augment: bool, seed: int, drop_last: bool
    ) -> None:
        super().__init__(len(split), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self._labels, self._augment, self._device = split.labels, augment, split.device
        self._dtype = split.dtype
        self._layout = torch.channels_last if split.channels_last else torch.contiguous_format
        moments = split.augmentation.mean, split.augmentation.std
        mean, std = (torch.tensor(value, device=split.device).view(-1, 1, 1) for value in moments)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._passes, self._jobs = 0, Jobs()
        workers = min(split.num_workers, len(self))
        self._reader: DataLoader = DataLoader(
            Reader(split.root, split.files, split.augmentation),
            batch_sampler=self._jobs,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=split.device.type == "cuda",
            generator=torch.Generator(),  # otherwise every pass would draw from the global generator
        )

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        self._passes += 1
        mine = self._passes
        self._jobs.batches = ([self._job(row, epoch) for row in rows] for rows in self._rows(epoch, start))
        for pixels, rows in zip(self._reader, self._rows(epoch, start), strict=True):
            if isinstance(pixels, UserError):
                raise pixels
            x = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            x = x.to(torch.float32, memory_format=self._layout).mul_(self._scale).add_(self._shift)
            yield x.to(self._dtype), self._labels[rows].to(self._device, non_blocking=True)
            if self._passes != mine:  # the workers serve one pass at a time
                raise RuntimeError("this iterator is no longer valid: a newer pass over the same loader has started")

    def _rows(self, epoch: int, start: int) -> Iterator[list[int]]:
        return (rows.tolist() for _, rows in self._plan(epoch, start))

    def _job(self, row: int, epoch: int) -> Job:
        """Seeded by the row, which an epoch reads once, so the augmentation does not depend on the batch size."""
        return row, hashed_seed(self._seed, epoch, row) if self._augment else None


def _as_it_is(batch: Any) -> Any:
    return batch
