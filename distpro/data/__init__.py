"""Data sets: labelled pictures as resumable batches, already normalised and on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import UserError, unknown
from .base import Dataset, Loader, Request, Split, arranged, holdout
from .cifar import cifar10, cifar100
from .digits import digits
from .folder import folder

__all__ = ["DATASETS", "Dataset", "Loader", "Split", "arranged", "create_dataset", "holdout"]

# A new data set is one new file and one line here.
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
) -> Dataset:
    """The data set `name`, read from the folder `root` where it needs one ('digits' does not).

    `image_size`: side of the batches in pixels, None for the data set's own. `device`: where batches arrive;
    CIFAR and digits live there altogether. `num_workers`: processes that read a 'folder' (None: one a core,
    at most 8; 0: none, this process reads).
    UserError for an unknown name, a folder that is absent or not as it should be, a damaged file.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size}: expected at least 1 pixel")
    if num_workers is not None and num_workers < 0:
        raise UserError(f"{num_workers} workers: expected 0 (read in this process) or more")
    where = None if root is None else Path(root).expanduser()
    return DATASETS[name](Request(name, where, image_size, torch.device(device), num_workers))
