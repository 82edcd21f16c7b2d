"""What every test shares."""

from pathlib import Path

import pytest
import torch
from drawn import save

# Networks of test size lose by threads: a step of 43 ms takes 150 to 2900 ms with two on a busy two-core machine.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """An ImageFolder of three classes, with the kinds of images that are found in the wild."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                save(root / part / name / f"{i}.jpg", 100 * label + i, size=(90, 70 + i))
    save(root / "train/ant/grey.jpeg", 1, mode="L")
    save(root / "train/bee/print.JPG", 2, mode="CMYK", size=(300, 60))
    save(root / "train/cat/clear.png", 3, mode="RGBA")
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.cache").mkdir()
    return root
