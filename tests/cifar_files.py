"""Folders of random images in the layouts in which CIFAR is published."""

import io
import pickle
import struct
from pathlib import Path

import numpy as np

LAYOUTS = {
    ("cifar10", "binary"): ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
    ("cifar10", "python"): ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    ("cifar100", "binary"): ("cifar-100-binary", ["train.bin"], "test.bin"),
    ("cifar100", "python"): ("cifar-100-python", ["train"], "test"),
}  # fmt: skip


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the 8-bit strings of Python 2, which made the published files."""

    def save_string(self, value):
        value = value if isinstance(value, bytes) else value.encode()
        self.write(b"T" + struct.pack("<i", len(value)) + value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}  # noqa: RUF012


def python2(value) -> bytes:
    Python2Pickler(stream := io.BytesIO(), protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_cifar(place: Path, name: str, layout: str, rows: int = 40, dumps=python2) -> tuple[Path, dict]:
    """A folder of random images as published; also {file: (labels, pixels [rows, 3072])}."""
    folder, train, test = LAYOUTS[name, layout]
    chance, classes = np.random.default_rng(0), 10 if name == "cifar10" else 100
    (place / folder).mkdir(parents=True, exist_ok=True)
    written = {}
    for file in [*train, test]:
        labels = chance.integers(0, classes, rows).astype(np.uint8)
        pixels = chance.integers(0, 256, (rows, 3072)).astype(np.uint8)
        written[file.removesuffix(".bin")] = labels, pixels
        columns = [labels[:, None], pixels] if classes == 10 else [labels[:, None] // 5, labels[:, None], pixels]
        key = b"labels" if classes == 10 else b"fine_labels"
        content = {b"data": pixels, key: labels.tolist(), b"batch_label": b"one of some"}
        binary = np.concatenate(columns, 1).tobytes()
        (place / folder / file).write_bytes(binary if layout == "binary" else dumps(content))
    return place / folder, written
