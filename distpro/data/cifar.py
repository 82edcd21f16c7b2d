"""CIFAR-10 and CIFAR-100 from the folders in which they are published, binary or Python."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .base import Dataset, Request
from .resident import Augmentation, Resident

PIXELS = 3 * 32 * 32  # bytes of an image: its red, green and blue plane


@dataclass(frozen=True)
class Layout:
    """One published format: where its files are and what a record looks like."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # the file of class names
    labels: int | str  # binary: label bytes before each image, of which the last is used; Python: key of the labels


CIFAR10 = (
    Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
    ),
)
CIFAR100 = (
    Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    Layout("cifar-100-python", ("train",), "test", "meta", "fine_labels"),
)


def cifar10(request: Request) -> Dataset:
    """CIFAR-10, [3, 32, 32]: 10 classes; random crop with 4 pixels of padding, and flip."""
    return _cifar(request, CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(request: Request) -> Dataset:
    """CIFAR-100, [3, 32, 32]: 100 fine classes; random crop with 4 pixels of padding, and flip."""
    return _cifar(request, CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def _cifar(
    request: Request,
    layouts: tuple[Layout, ...],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Dataset:
    root, layout = _locate(request, layouts)
    augmentation = Augmentation(
        mean, std, padding=4, flip=True, image_size=request.image_size, alternate=request.alternate
    )

    def split(*names: str) -> Resident:
        parts = [_read(root / name, layout.labels, classes) for name in names]
        images = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32))
        labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]).astype(np.int64))
        return Resident.of(images, labels, augmentation, request.device, request.cuda_graphs)

    train = split(*layout.train)
    names = _class_names(root / layout.names, layout.labels, classes)
    return Dataset(request.name, classes, names, train.shape, train, split(layout.test))


def _locate(request: Request, layouts: tuple[Layout, ...]) -> tuple[Path, Layout]:
    """The folder with the data, `root` itself or the published folder inside it, and its layout."""
    expected = " or ".join(f"{_listed(layout)} (folder {layout.folder})" for layout in layouts)
    root = request.folder(f"it to hold {expected}")
    places = [(folder, layout) for layout in layouts for folder in (root, root / layout.folder)]
    missing = [[n for n in (*layout.train, layout.test) if not (folder / n).is_file()] for folder, layout in places]
    best = min(range(len(places)), key=lambda place: len(missing[place]))
    folder, layout = places[best]
    if not missing[best]:
        return folder, layout
    if len(missing[best]) <= len(layout.train):
        raise UserError(f"'{folder}' is missing {', '.join(missing[best])}: expected {_listed(layout)}")
    archives = [path.name for path in sorted(root.glob("cifar-*.tar*"))]
    hint = f"; unpack {' or '.join(archives)} first" if archives else ""
    raise UserError(f"no {request.name} in '{root}': expected {expected}{hint}")


def _listed(layout: Layout) -> str:
    return f"{layout.train[0]}{' to ' + layout.train[-1] if layout.train[1:] else ''} and {layout.test}"


def _read(file: Path, labels: int | str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 3072] and labels [N] of one file, in either layout."""
    if isinstance(labels, int):
        row, size = labels + PIXELS, file.stat().st_size
        if size == 0 or size % row:
            raise UserError(
                f"'{file}' has {size} bytes: expected a multiple of {row} "
                f"({labels} of labels and {PIXELS} of an image); is it truncated?"
            )
        records = np.fromfile(file, np.uint8).reshape(-1, row)
        pixels, found = records[:, labels:], records[:, labels - 1]
    else:
        batch = _unpickled(file)
        try:
            pixels, found = batch["data"], np.asarray(batch[labels])
            if pixels.shape != (len(found), PIXELS) or found.dtype.kind not in "iu" or not len(found):
                raise ValueError
        except (KeyError, ValueError, AttributeError, TypeError):
            raise UserError(
                f"'{file}' is not a CIFAR batch: expected 'data', a uint8 array [N, {PIXELS}], "
                f"and '{labels}', N numbers"
            ) from None
    if found.min() < 0 or found.max() >= classes:
        raise UserError(f"'{file}' has labels from {found.min()} to {found.max()}: expected 0 to {classes - 1}")
    return pixels, found


def _class_names(file: Path, labels: int | str, classes: int) -> tuple[str, ...]:
    """The class names from their file; plain numbers if it is missing."""
    if not file.is_file():
        return tuple(str(label) for label in range(classes))
    if isinstance(labels, int):
        names = file.read_text().split()
    else:
        key = labels.removesuffix("s") + "_names"
        names = [_text(name) for name in _unpickled(file).get(key, [])]
    if len(names) != classes:
        raise UserError(f"'{file}' has {len(names)} class names: expected {classes}")
    return tuple(names)


# The Python layout is a pickle, and a pickle may name any function to be called. The few that a uint8 array
# needs are replaced by the stand-ins below; every other name is refused before it is looked up or imported.


def _unpickled(file: Path) -> dict[str, Any]:
    """The dictionary in `file`, its keys as text; UserError if it holds more than plain values and uint8 arrays."""
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
        return {_text(key): getattr(value, "array", value) for key, value in content.items()}
    except _Refused as refused:
        raise UserError(f"'{file}' is not a CIFAR file: its pickle refers to {refused}, which is refused") from None
    except Exception as error:  # a damaged pickle fails in any of a dozen ways
        raise UserError(f"cannot read '{file}' as a CIFAR pickle ({error}); is it truncated?") from None


class _Refused(Exception):
    pass


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin1")


class _Dtype:
    """Stands in for numpy.dtype; refuses all but uint8."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if _text(code) not in ("u1", "|u1"):
            raise _Refused(f"an array of '{_text(code)}'")

    def __setstate__(self, state: tuple) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray; holds a uint8 array."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, _dtype, fortran, raw = state
        self.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(raw: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    """Stands in for numpy's _frombuffer, with which pickle protocol 5 writes arrays."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _encode(text: str, encoding: str | bytes = "latin1") -> bytes:
    """Stands in for _codecs.encode, with which pickle protocol 2 writes bytes."""
    if _text(encoding) != "latin1":
        raise _Refused(f"the codec '{_text(encoding)}'")
    return text.encode("latin1")


_STAND_INS = {
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _Refused(f"'{module}.{name}'") from None
