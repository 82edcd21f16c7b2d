"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that need no download."""

from __future__ import annotations

import torch

from .base import Dataset, Request, stratified
from .resident import Augmentation, Resident

# Of the 1,438 training images, divided by 16 (a test recomputes them).
MEAN, STD = (0.3054,), (0.3761,)


def digits(request: Request) -> Dataset:
    """1,438 train and 359 test images [1, 8, 8], shifted by up to 1 pixel to augment, never flipped.

    The split is stratified and always the same. `root` and `num_workers` are ignored.
    """
    from sklearn.datasets import load_digits  # imported here: it takes a second, only needed for this data set

    found = load_digits()
    images = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)  # whole numbers 0..16
    labels = torch.from_numpy(found.target).long()
    augmentation = Augmentation(MEAN, STD, padding=1, flip=False, image_size=request.image_size, peak=16.0)
    every = Resident.of(images, labels, augmentation, request.device, request.cuda_graphs)
    train, test = (every.subset(rows) for rows in stratified(labels, 0.2, seed=0))
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", 10, names, every.shape, train, test)
