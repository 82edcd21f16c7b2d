"""Data sets: labelled images as resumable batches, already normalised and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError, unknown
from ..precision import DTYPES
from .base import MEAN, STD, Channels, Dataset, Loader, ProgressiveResizing, Request, Split, holdout, with_eval_split
from .cifar import cifar10, cifar100
from .digits import digits
from .folder import LOADERS, default_loader, folder

__all__ = [
    "DATASETS",
    "LOADERS",
    "MEAN",
    "STD",
    "Dataset",
    "Loader",
    "ProgressiveResizing",
    "Split",
    "create_dataset",
    "default_loader",
    "holdout",
    "with_eval_split",
]

# To add a data set, write one file and add one line here; the commands also need its defaults in `distpro.defaults`.
DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": digits,
    "folder": folder,
}


def create_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    num_workers: int | None = None,
    loader: str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    mean: Channels | None = None,
    std: Channels | None = None,
    alternating_flip: bool = False,
    cuda_graphs: bool | None = None,
) -> Dataset:
    """The data set `name`, read from the folder `root` if it needs one ('digits' does not).

    image_size: side of the batches in pixels; None for the data set's own.
    device: where batches are delivered; CIFAR and digits are kept there as a whole.
    num_workers: processes that read a 'folder' (None: one per core, at most 8; 0: this process), or DALI's threads.
    loader: 'dali', 'torchvision' or 'synthetic', for a 'folder' (None: DALI if installed).
    dtype, channels_last: of the batches of a 'folder'; float32, float16 or bfloat16. DALI needs no extra copy for
        them, except for bfloat16, which it does not support.
    mean, std: of red, green and blue in 0 to 1, to normalise a 'folder' (None: ImageNet's); other sets have their own.
    alternating_flip: for CIFAR, flip each image in every other epoch instead of at random.
    cuda_graphs: False makes the batches of CIFAR and digits on a GPU without CUDA graphs.

    Raises UserError for an unknown name, a missing or malformed folder, or a damaged file.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size}: expected at least 1 pixel")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"{num_workers} workers: expected 0 (read in this process) or more")
    if loader is not None and loader not in LOADERS:
        raise unknown("loader", loader, LOADERS)
    if loader is not None and name != "folder":
        raise UserError(f"data set '{name}' is not read by a loader: --loader only applies to 'folder'")
    if dtype not in DTYPES.values():
        raise UserError(f"batches of {dtype}: expected one of {', '.join(DTYPES)}")
    if (mean or std) and name != "folder":
        raise UserError(f"data set '{name}' has a mean and std of its own: --mean and --std only apply to 'folder'")
    if std is not None and min(std) <= 0:
        raise UserError(f"std {' '.join(map(str, std))}: expected three numbers above 0")
    if alternating_flip and name not in ("cifar10", "cifar100"):
        raise UserError(
            f"data set '{name}' cannot flip in every other epoch: --alternating-flip is for cifar10 and cifar100"
        )
    where = None if root is None else Path(root).expanduser()
    request = Request(name, where, image_size, torch.device(device), num_workers, loader, dtype, channels_last)
    captured = cuda_graphs is not False
    request = replace(request, mean=mean or MEAN, std=std or STD, alternate=alternating_flip, cuda_graphs=captured)
    return DATASETS[name](request)
