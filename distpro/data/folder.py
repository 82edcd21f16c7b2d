"""Folders of images, one folder per class: which images there are, and in which split."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest, unknown
from .base import Dataset, Request, missing_folder, stratified
from .images import Augmentation, ImageFiles, size_of
from .synthetic import synthetic

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
LOADERS = ("dali", "torchvision", "synthetic")
EXPECTED = "train/<class>/*.jpg with val/<class>/* (or test), or just <class>/*.jpg, which is then split 80/20"
LOOKED_AT = 256  # images over the whole set whose size decides how all are augmented, beside each class's first
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet: image, class and box, separated by tabs


def folder(request: Request) -> Dataset:
    """The images below `root`, in one of three layouts; classes are the sorted names of the training folders.

    root/train/<class>/* with root/val/<class>/* (or root/test, if there is no val); Tiny-ImageNet's, with
    train/<class>/images/* and val/images/* labelled by val/val_annotations.txt; or root/<class>/* alone: then
    a fixed fifth of each class is the test split, and the name of the data set says so.

    Without `image_size` the batches are 224x224 or, if all images are small squares of one size (Tiny-ImageNet),
    of that size. `images.Augmentation` describes the augmentation. UserError for a missing, empty or malformed
    folder and, while reading, for a damaged image. The loader "synthetic" reads no files.
    """
    if request.loader == "synthetic":
        return synthetic(request)
    root, name = request.folder(EXPECTED), request.name
    parts = _folders(root)
    if "train" in parts and not _inside(root / "train")[0]:
        held = next((part for part in ("val", "test") if part in parts), None)
        if held is None:
            others = [part for part in parts if part != "train"]
            close = [f"'{part}'" for part in others if nearest(part, ("validation", "valid", "testing"))]
            hint = f" (rename {' or '.join(close)}?)" if close else ""
            raise UserError(f"'{root}' has 'train' but neither 'val' nor 'test'{hint}: expected {EXPECTED}")
        files, labels, classes = _classes(root, "train")
        if (root / held / ANNOTATIONS).is_file():
            test = _annotated(root, held, classes)
        else:
            test = _classes(root, held, classes)[:2]
    else:
        files, labels, classes = _classes(root, "")
        rest, chosen = (rows.numpy() for rows in stratified(labels, 0.2, seed=0))
        if len(chosen) == 0:
            raise UserError(f"'{root}' has {len(files)} images, too few to split 80/20: expected at least 5")
        test = files[chosen], labels[chosen]
        files, labels = files[rest], labels[rest]
        name = f"{name} (a fixed fifth held out for test)"
    augmentation = _augmentation(root, files, labels, request)
    workers = min(8, _cores()) if request.num_workers is None else request.num_workers
    kind = _image_files(request.loader or default_loader())
    if kind is not ImageFiles:  # DALI turns, greys or shades some TIFFs otherwise, without an error
        tiff = next((file for file in [*files, *test[0]] if file.lower().endswith((b".tif", b".tiff"))), None)
        if tiff is not None:
            raise UserError(f"DALI reads some TIFFs unlike Pillow ('{os.fsdecode(tiff)}'): give --loader torchvision")
    form = request.dtype, request.channels_last
    train = kind(files, labels, os.fsencode(root), augmentation, request.device, workers, *form)
    held_out = replace(train, files=test[0], labels=test[1])
    return Dataset(name, len(classes), classes, (3, augmentation.image_size, augmentation.image_size), train, held_out)


def default_loader() -> Literal["dali", "torchvision"]:
    """DALI if it is installed."""
    return "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torchvision"


def _image_files(loader: str) -> type[ImageFiles]:
    """The split class for `loader`; UserError if that is DALI and it cannot be imported."""
    if loader == "torchvision":
        return ImageFiles
    try:
        from .dali import DaliImageFiles
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--loader dali cannot be used ({reason}): expected nvidia-dali-cuda130 "
            "(pip install 'distpro[dali]', Linux), or take --loader torchvision"
        ) from None
    return DaliImageFiles


def _classes(root: Path, part: str, known: tuple[str, ...] = ()) -> tuple[np.ndarray, Tensor, tuple[str, ...]]:
    """Files, labels and class names of root/part/<class>[/images]/*; labelled as in `known`, if given."""
    names = _folders(root / part)
    if not names:
        raise UserError(f"no class folders in '{root / part}': expected {EXPECTED}")
    strange = [name for name in names if known and name not in known]
    if strange:
        raise UserError(f"in '{root / part}': {unknown('class', strange[0], known)}")
    files: list[str] = []
    labels: list[int] = []
    for name in names:
        here = os.path.join(part, name)
        found, folders = _inside(root / here)
        if not found and "images" in folders:
            here = os.path.join(here, "images")
            found, folders = _inside(root / here)
        deeper = next((name for name in folders if _inside(root / here / name)[0]), None)
        if found and deeper:
            raise UserError(
                f"class folder '{root / here}' holds images and a folder '{deeper}' of images: expected {EXPECTED}"
            )
        if not found:
            endings = " ".join(ENDINGS)
            raise UserError(f"no images ({endings}) in class folder '{root / here}': expected {EXPECTED}")
        files += [os.path.join(here, file) for file in found]
        labels += [(known or names).index(name)] * len(found)
    return _packed(files), torch.tensor(labels), tuple(names)


def _annotated(root: Path, part: str, classes: tuple[str, ...]) -> tuple[np.ndarray, Tensor]:
    """Files and labels listed in Tiny-ImageNet's annotations, in that order."""
    source, images = root / part / ANNOTATIONS, root / part / "images"
    present = set(_inside(images)[0]) if images.is_dir() else set()
    index = {name: label for label, name in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in index:
            raise UserError(f"in '{source}', line {number}: {unknown('class', name, classes)}")
        if file not in present:
            raise UserError(f"'{source}', line {number}, names '{file}': expected it in '{images}'")
        files.append(os.path.join(part, "images", file))
        labels.append(index[name])
    if not files:
        raise UserError(f"'{source}' names no images: expected lines of image, tab, class")
    return _packed(files), torch.tensor(labels)


def _augmentation(root: Path, files: np.ndarray, labels: Tensor, request: Request) -> Augmentation:
    """Chosen by the sizes of some images: small ones are augmented lightly and keep their size."""
    first = np.unique(labels.numpy(), return_index=True)[1]
    spread = np.linspace(0, len(files) - 1, min(len(files), LOOKED_AT)).astype(int)  # one small one may come first
    sizes = {size_of(os.path.join(os.fsencode(root), file)) for file in files[np.union1d(first, spread)]}
    sides = {side for size in sizes for side in size}
    small = max(sides) <= 64
    image_size = request.image_size
    if image_size is None:
        image_size = min(sides) if small and len(sides) == 1 else 224
    return Augmentation(image_size, small and image_size <= 64, request.mean, request.std)


def _folders(folder: Path) -> list[str]:
    """The folders in `folder`, which has to be there, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{missing_folder(folder)}; expected {EXPECTED}")
    return _inside(folder)[1]


def _inside(folder: Path) -> tuple[list[str], list[str]]:
    """The images and the folders directly in `folder`, each sorted by name, without hidden ones and __MACOSX."""
    files: list[str] = []
    folders: list[str] = []
    for entry in os.scandir(folder):
        if not entry.name.startswith(".") and entry.name != "__MACOSX":
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(name for name in files if name.lower().endswith(ENDINGS)), sorted(folders)


def _packed(files: list[str]) -> np.ndarray:
    return np.array([os.fsencode(file) for file in files])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
