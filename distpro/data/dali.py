"""Images decoded, cropped and normalised by NVIDIA DALI: on the GPU, or by threads of this process on the CPU.

The batches equal those of the torchvision-like loader in `images.py`, with the same windows and flips, up to rounding
in resizing: one of 255 levels if both decode on the CPU (equal to the bit on 300 ImageNet JPEGs), more at the border of
a random window, because DALI decodes and resizes only the window.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from ..errors import UserError
from .base import Batch, Loader, hashed_seed
from .images import TRIES, Augmentation, ImageFiles, decoded, draw

AHEAD = 2  # batches that DALI prefetches
Order = tuple[list[np.ndarray], ...]  # one batch: paths uint8 [N][bytes], and random numbers float64 [N][2 * TRIES + 3]
Orders = Iterator[Order] | Callable[[], Order]

# If a forked process (such as a worker of the torchvision-like loader) garbage-collected a pipeline of its parent, it
# would wait forever for DALI's threads, which fork does not copy.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


class DaliImageFiles(ImageFiles):
    """A split whose images DALI reads from their files when a batch needs them."""

    def loader(
        self, batch_size: int, *, shuffle: bool, augment: bool, seed: int = 0, drop_last: bool = False
    ) -> Loader:
        return DaliLoader(self, batch_size, shuffle, augment, seed, drop_last)


@dataclass
class Told:
    """The source that DALI calls for its orders. A reference to the loader would keep it, and GPU memory, alive."""

    orders: Iterator[Order] = field(default_factory=lambda: iter(()))

    def __call__(self) -> Order:
        return next(self.orders)


class DaliLoader(Loader):
    """Batches read from files, on the split's device.

    DALI's readers and random operators carry state from batch to batch: to get batch k of an epoch they need the k
    batches before it, or a checkpoint of that very run. Here DALI is given the files and random numbers of every batch
    instead, so that any step of any epoch can come first, nothing has to be saved, and dropped, partial and sharded
    batches are as `Loader._plan` has them. This takes 6 us of Python per image (AMD EPYC).
    """

    def __init__(
        self, split: DaliImageFiles, batch_size: int, shuffle: bool, augment: bool, seed: int, drop_last: bool
    ) -> None:
        super().__init__(len(split), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self._split, self._augment = split, augment
        self._iterator: Any = None
        self._told = Told()
        self._ahead: deque[list[int]] = deque()  # rows of the batches that DALI was given but has not delivered
        self._intact: set[int] = set()  # rows whose files look truncated but are not
        self._passes = 0

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        self._passes += 1
        mine = self._passes
        split, dtype = self._split, self._split.dtype
        if self._ahead:  # the last pass ended early or failed: its remaining batches would come first
            self._iterator = None
            self._ahead.clear()
        self._told.orders = self._orders(epoch, start)
        if self._iterator is None:
            self._iterator = _iterator(split, self._augment, self._batch_size, self._told)
        else:
            self._iterator.reset()
        while True:
            try:
                (out,) = next(self._iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._refused(error) from None
            rows = self._ahead.popleft()
            self._check_ends(rows, out["ends"].numpy())
            x = out["x"].permute(0, 3, 1, 2) if split.channels_last else out["x"]
            yield x.to(dtype), split.labels[rows].to(split.device, non_blocking=True)
            if self._passes != mine:
                raise RuntimeError("this iterator is no longer valid: a newer pass over the same loader has started")

    def _orders(self, epoch: int, start: int) -> Iterator[Order]:
        """What DALI is given for each batch."""
        for _, picked in self._plan(epoch, start):
            rows = picked.tolist()
            self._ahead.append(rows)
            names = [self._name(row) for row in rows]
            numbers = [draw(hashed_seed(self._seed, epoch, row)) for row in rows] if self._augment else []
            yield (names, list(np.array(numbers))) if self._augment else (names,)

    def _path(self, row: int) -> bytes:
        return os.path.join(self._split.root, self._split.files[row])

    def _name(self, row: int) -> np.ndarray:
        return np.frombuffer(self._path(row), np.uint8)

    def _check_ends(self, rows: list[int], ends: np.ndarray) -> None:
        """UserError for a truncated JPEG: DALI may not notice it, or may fill in what is missing.

        ends: uint8 [N, 4], the first two and last two bytes of each file. If a file begins like a JPEG but does not
        end like one, Pillow decides: other bytes may follow the end of an image.
        """
        cut = (ends[:, :2] == (0xFF, 0xD8)).all(1) & (ends[:, 2:] != (0xFF, 0xD9)).any(1)
        for row in (rows[i] for i in cut.nonzero()[0]):
            if row not in self._intact:
                decoded(self._path(row))
                self._intact.add(row)

    def _refused(self, error: RuntimeError) -> UserError:
        """The error that names the unreadable image among those DALI was working on: DALI itself names none."""
        rows = [row for batch in self._ahead for row in batch]
        for row in rows:
            try:
                decoded(self._path(row))
            except UserError as found:
                return found
        for row in rows:
            orders = iter([([self._name(row)],)])
            alone = _iterator(self._split, False, 1, orders)
            try:
                next(alone)
            except RuntimeError as found:
                path = os.fsdecode(self._path(row))
                return UserError(f"DALI cannot read image '{path}' ({_reason(found)}): give --loader torchvision")
        return UserError(f"DALI failed: {_reason(error)}; --loader torchvision does not use DALI")


def _reason(error: RuntimeError) -> str:
    """DALI's message without traceback and context."""
    text = str(error).rsplit("encountered:", 1)[-1].split("C++ context")[0].split("Current pipeline")[0]
    return " ".join(text.split())


def _iterator(split: DaliImageFiles, augment: bool, batch_size: int, source: Orders) -> Any:
    """The batches that `source` orders, until it raises StopIteration: "x" and "ends" (see `_check_ends`)."""
    device = split.device
    on_gpu = device.type == "cuda"
    pipeline = _pipeline(
        source,
        split.augmentation,
        augment,
        decoder="mixed" if on_gpu else "cpu",
        layout="HWC" if split.channels_last else "CHW",
        dtype=types.FLOAT16 if split.dtype == torch.float16 else types.FLOAT,
        batch_size=batch_size,
        num_threads=max(1, split.num_workers),
        # None makes DALI work without a GPU
        device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
        prefetch_queue_depth=AHEAD,
        # Dynamic execution hands out DALI's own memory, which DALI reuses in its own order while the host is up to 100
        # steps ahead of the GPU. Without it the plugin copies, on torch's stream.
        exec_dynamic=not on_gpu,
    )
    return DALIGenericIterator(pipeline, ["x", "ends"], prepare_first_batch=False)


@pipeline_def
def _pipeline(
    source: Any, augmentation: Augmentation, augment: bool, decoder: str, layout: str, dtype: Any
) -> tuple[Any, Any]:
    """DALI's graph for `augmentation`: normalised images [N, C, H, W] or [N, H, W, C], and the ends of their files.

    EXIF rotation is ignored and chroma is upsampled smoothly, as in Pillow; DALI's defaults differ.
    """
    given = fn.external_source(
        source, num_outputs=1 + augment, dtype=[types.UINT8, types.FLOAT64][: 1 + augment], ndim=1
    )
    file = fn.io.file.read(given[0])
    found = fn.peek_image_shape(file, adjust_orientation=False, dtype=types.INT32)  # H, W, C
    decode: dict[str, Any] = {"device": decoder, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    resize: dict[str, Any] = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    size = augmentation.image_size
    if augment and not augmentation.light:
        start, shape = _random_resized_crop_box(found, given[1])
        image = fn.decoders.image_slice(file, start=start, shape=shape, axes=(0, 1), **decode)
        image = fn.resize(image, size=(size, size), **resize)
    else:
        image = fn.decoders.image(file, **decode)
        image = _center_crop(image, found, size if augmentation.light else round(size * 256 / 224), size, resize)
    mirror: Any = 0
    if augment:
        mirror = fn.cast(given[1][-1] < 0.5, dtype=types.INT32)
        if augmentation.light:
            pad = size // 8
            shift = _whole(fn.stack(given[1][-2], given[1][-3]) * (2 * pad + 1)) - pad  # down, right
            image = fn.slice(
                image, start=shift, shape=(size, size), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
    mean, std = ([255 * value for value in values] for values in (augmentation.mean, augmentation.std))
    x = fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=std, dtype=dtype, output_layout=layout)
    return x, fn.cat(file[:2], file[-2:])


def _center_crop(image: Any, found: Any, short: int, size: int, resize: dict[str, Any]) -> Any:
    """`images.center_crop` in DALI, whose own sizes and crop positions are rounded differently."""
    height, width = found[0], found[1]
    least = math.min(height, width)
    sides = fn.stack(height * short // least, width * short // least)
    image = fn.resize(image, size=fn.cast(sides, dtype=types.FLOAT), **resize)
    spare = sides - size
    half = spare // 2
    start = half + (spare & half & 1)  # rounds half to even
    return fn.slice(image, start=start, shape=(size, size), axes=(0, 1))


def _random_resized_crop_box(found: Any, numbers: Any) -> tuple[Any, Any]:
    """`images.random_resized_crop_box` in DALI: start (top, left) and shape (height, width)."""
    height, width = found[0], found[1]
    area = fn.cast(height * width, dtype=types.FLOAT64) * (0.08 + 0.92 * numbers[:TRIES])
    shape = 3 / 4 * math.pow(16 / 9, numbers[TRIES : 2 * TRIES])
    w, h = (_whole(math.sqrt(value) + 0.5) for value in (area * shape, area / shape))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    rank = fits * types.Constant(np.arange(TRIES, 0, -1, dtype=np.int32))
    best = fn.reductions.max(rank)
    none = best == 0  # no try fits: take the middle, as large as the aspect ratio allows
    start, window = [], []
    for tries, side, other, place in ((h, height, width, numbers[-2]), (w, width, height, numbers[-3])):
        length = fn.reductions.sum(tries * (fits & (rank == best))) + none * math.min(side, (other * 8 + 3) // 6)
        spare = side - length
        anywhere = _whole(place * (spare + 1))
        start.append(anywhere + none * (spare // 2 - anywhere))
        window.append(length)
    return tuple(fn.cast(fn.stack(*pair), dtype=types.INT32) for pair in (start, window))


def _whole(value: Any) -> Any:
    return fn.cast(math.floor(value), dtype=types.INT32)
