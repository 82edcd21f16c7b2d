"""The parts of every data set: splits, loaders, and random numbers that can be resumed mid-epoch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest

Batch: TypeAlias = tuple[Tensor, Tensor]  # x [N, C, H, W], normalised, float32 unless asked otherwise; y int64 [N]
Rows: TypeAlias = Tensor | np.ndarray | Sequence[int]
Channels: TypeAlias = tuple[float, float, float]  # red, green, blue
MEAN: Channels = (0.485, 0.456, 0.406)  # ImageNet's
STD: Channels = (0.229, 0.224, 0.225)


def hashed_seed(*key: int) -> int:
    """Hash several integers into one seed below 2^63, the same on every machine."""
    digest = hashlib.blake2b(repr([int(k) for k in key]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by `key` alone, so that no batch depends on earlier ones."""
    return torch.Generator().manual_seed(hashed_seed(*key))


class Loader(ABC):
    """Batches of one split, epoch after epoch: `for x, y in loader`.

    The same (seed, epoch) gives the same batches and augmentation, whatever was read before. Each `for` reads
    the next epoch, starting at 0, unless `set_epoch` chose another. Only one pass may run at a time.
    """

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        """`size`: number of images in the split. UserError if an epoch would have no steps."""
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected at least 1")
        self._size, self._batch_size, self._shuffle, self._seed = size, batch_size, shuffle, seed
        self._drop_last, self._next = drop_last, (0, 0)
        self.shard(0, 1)

    def shard(self, rank: int, ranks: int) -> Loader:
        """From the next `for` on, read the share of `rank` among `ranks`, `batch_size` images per rank; returns self.

        Each image of an epoch is read once, by one rank. With `drop_last` all ranks have equally many steps, and
        their batches of step k together are batch k of a single process with `ranks` times the batch size. Without
        it the ranks' shares differ by up to one image, so that a rank may have one step less.
        """
        if not 0 <= rank < ranks:
            raise UserError(f"rank {rank} of {ranks}: expected 0 to {ranks - 1}")
        together = self._batch_size * ranks
        if self._drop_last and together > self._size:
            raise UserError(
                f"batch size {together} is larger than the {self._size} images of the split, "
                f"of which no full batch can be made: expected at most {self._size}"
            )
        self._rank, self._ranks = rank, ranks
        mine = len(range(rank, self._size, ranks))
        self._steps = self._size // together if self._drop_last else -(-mine // self._batch_size)
        return self

    def __len__(self) -> int:
        """Steps in a full epoch."""
        return self._steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Make the next `for` read `epoch` from batch `start_step` on (`len(self)`: no batches)."""
        if not 0 <= start_step <= self._steps:
            raise UserError(
                f"start step {start_step} is outside an epoch of {self._steps} steps: "
                "expected the batch size and the data of the run that is resumed"
            )
        self._next = (epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._next
        self._next = (epoch + 1, 0)
        return self._read(epoch, start)

    @abstractmethod
    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches `start`, `start + 1`, ... of `epoch`."""

    def _plan(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor]]:
        """(step, rows of the split [N] int64) for every batch of `epoch` from `start` on."""
        for step, rows in self._plan_of_all(epoch, start):
            yield step, rows[self._rank :: self._ranks]

    def _plan_of_all(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor]]:
        """Like `_plan`, but with the rows of all ranks; a rank's own are every `_ranks`-th from `_rank` on."""
        order = torch.arange(self._size)
        if self._shuffle:
            order = torch.randperm(self._size, generator=generator(self._seed, epoch))
        together = self._batch_size * self._ranks
        for step in range(start, self._steps):
            yield step, order[step * together : (step + 1) * together]


class ProgressiveResizing:
    """Progressive resizing: `epochs` are split evenly into phases of whole epochs, one for each of `sides`.

    read: creates the loader for a side in pixels; the previous loader is released. Seeds, steps and crop windows are
    the same at every size: only the resizing differs.
    """

    def __init__(self, read: Callable[[int], Loader], sides: Sequence[int], epochs: int) -> None:
        if len(sides) > epochs:
            raise UserError(f"--size-schedule has {len(sides)} sizes: expected at most one for each of {epochs} epochs")
        self._read, self._sides, self._epochs = read, sides, epochs
        self._side, self._loader = sides[0], read(sides[0])
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        self._epoch += 1
        side = self._sides[min(epoch, self._epochs - 1) * len(self._sides) // self._epochs]
        if side != self._side:
            self._side, self._loader = side, self._read(side)
        self._loader.set_epoch(epoch)
        return iter(self._loader)


class Split(ABC):
    """Labelled images; `labels` is int64 [N] on the CPU, in the order of the images."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Rows) -> Split:
        """The images at `indices`, in that order. UserError if there are none, IndexError if one is out of range."""
        rows = torch.arange(len(self))[torch.as_tensor(indices, dtype=None if len(indices) else torch.int64)]
        if len(rows) == 0:
            raise UserError(f"an empty subset: expected at least one of the {len(self)} images of the split")
        return self._take(rows)

    @abstractmethod
    def sized(self, side: int) -> Split:
        """The same images, in batches of `side` by `side` pixels."""

    @abstractmethod
    def _take(self, rows: Tensor) -> Split:
        """The split of `rows` [N] int64, N >= 1."""

    @abstractmethod
    def loader(
        self, batch_size: int, *, shuffle: bool, augment: bool, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        """Batches of normalised images; `augment` adds the data set's random crop (and flip)."""


@dataclass(frozen=True)
class Dataset:
    """A classification data set: two splits and what a network needs to know about them."""

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # C, H, W of the batches
    train: Split
    test: Split


@dataclass(frozen=True)
class Request:
    """The arguments of `create_dataset`, as the functions in `DATASETS` take them."""

    name: str
    root: Path | None
    image_size: int | None
    device: torch.device
    num_workers: int | None
    loader: str | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    mean: Channels = MEAN
    std: Channels = STD
    alternate: bool = False
    cuda_graphs: bool = True

    def folder(self, expected: str) -> Path:
        """`root` if it is a folder, else a UserError that says what was `expected` there."""
        if self.root is None:
            raise UserError(f"data set '{self.name}' needs its folder (root): expected {expected}")
        if not self.root.is_dir():
            raise UserError(f"{missing_folder(self.root)}; expected {expected}")
        return self.root


def missing_folder(folder: Path) -> str:
    """The text "no folder 'x/imgenet': did you mean 'x/imagenet'?", with suggestions from its siblings."""
    if folder.is_file():
        return f"'{folder}' is a file, not a folder"
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = [f"'{folder.parent / name}'" for name in nearest(folder.name, beside)]
    return f"no folder '{folder}'" + (f": did you mean {' or '.join(close)}?" if close else "")


def stratified(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (rest, chosen), both ascending; `chosen` is a random `fraction` of each class, to within one image.

    Systematic sampling: after shuffling and a stable sort by class, an image is chosen whenever its position
    times `fraction` passes a whole number. `RandomState`, because NumPy froze its stream: every version of NumPy
    gives the same rows.
    """
    order = torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(len(labels)).astype(np.int64))
    order = order[torch.argsort(labels[order], stable=True)]
    passed = torch.floor(torch.arange(len(labels) + 1, dtype=torch.float64) * fraction + 1e-9)
    chosen = passed[1:] > passed[:-1]
    return order[~chosen].sort().values, order[chosen].sort().values


def holdout(split: Split, fraction: float = 0.2, seed: int = 0) -> tuple[Split, Split]:
    """Divide `split` into (train, val), with `fraction` of each class in val.

    Disjoint, complete, and the same for the same seed. UserError if nothing would be held out.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction {fraction}: expected a number between 0 and 1")
    rest, chosen = stratified(split.labels, fraction, seed)
    if len(chosen) == 0:
        raise UserError(f"held-out fraction {fraction} of {len(split)} images selects none: expected a larger one")
    return split.subset(rest), split.subset(chosen)


def with_eval_split(
    data: Dataset, eval_split: str = "test", fraction: float = 0.2, samples: int | None = None
) -> Dataset:
    """Choose the images of `data` to train on and to evaluate on; they are the same for every seed.

    eval_split: "validation" holds out `fraction` of the training images and evaluates on them.
    samples: train on this many images, the same share of each class.
    """
    train, test = data.train, data.test
    if eval_split == "validation":
        train, test = holdout(train, fraction)
    if samples is not None and samples != len(train):
        if not data.num_classes <= samples < len(train):
            raise UserError(
                f"{samples} training samples: expected {data.num_classes} (one a class) to {len(train)} images"
            )
        train = holdout(train, samples / len(train))[1]
    return replace(data, train=train, test=test)
