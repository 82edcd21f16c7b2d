"""Images drawn for the tests of the data sets, and what was seen of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from distpro.data import default_loader

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
needs_dali = pytest.mark.skipif(default_loader() != "dali", reason="DALI is absent: pip install 'distpro[dali]'")
LOADERS = ["torchvision", pytest.param("dali", marks=needs_dali)]
IMAGENET = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def save(file: Path, seed: int, size=(24, 20), mode="RGB", **options) -> None:
    """A smooth random image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(file, **options)


def seen(batches) -> Counter:
    """How often each (image, label) came."""
    return Counter((x.numpy().tobytes(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True))
