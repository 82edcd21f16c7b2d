"""Reading JPEGs for training: DALI, the torchvision-like loader, and tensors in memory as the upper bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.data import create_dataset, default_loader
from distpro.data.resident import Augmentation, Resident

SIZE = 224


def drawn(root: Path, count: int) -> Path:
    """Two classes of JPEGs of 500x375 pixels and about 100 KB, like ImageNet's."""
    chance = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize((500, 375))
        pixels = np.clip(np.asarray(coarse) + chance.normal(0, 12, (375, 500, 1)), 0, 255).astype(np.uint8)
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i}.jpg", quality=90)
    return root


@pytest.mark.skipif(default_loader() != "dali", reason="DALI is absent: pip install 'distpro[dali]'")
@pytest.mark.parametrize("augment", [True, False], ids=["train", "evaluate"])
def test_loader(compare_steps, benchmark, request, device, tmp_path, augment):
    """One epoch of decoded, cropped, flipped and normalised batches on the device, with new windows every round."""
    count, batch = request.config.getoption("--jpegs"), request.config.getoption("--jpeg-batch")
    root = request.config.getoption("--jpeg-folder") or drawn(tmp_path, count)
    loaders = {}
    for name in ("dali", "torchvision"):
        split = create_dataset("folder", root, image_size=SIZE, device=device, loader=name).train
        split = split.subset(range(min(count, len(split))))
        loaders[name] = split.loader(batch, shuffle=True, augment=augment)
    pixels = torch.randint(256, (len(split), 3, SIZE, SIZE), dtype=torch.uint8)
    held = Resident.of(pixels, split.labels, Augmentation((0.5,) * 3, (0.5,) * 3, padding=4, flip=True), device)
    loaders["memory"] = held.loader(batch, shuffle=True, augment=augment)

    def epoch(name):
        return sum(len(y) for _, y in loaders[name])

    assert {name: epoch(name) for name in loaders} == dict.fromkeys(loaders, len(split))
    ratio = compare_steps(
        {name: lambda name=name: epoch(name) for name in loaders},
        "dali",
        images=len(split),
        batch=batch,
        readers=split.num_workers,
    )
    took = benchmark.extra_info["milliseconds"]
    benchmark.extra_info["images_per_second"] = {name: round(len(split) / took[name][1] * 1e3) for name in took}
    benchmark.extra_info["times_faster_than_torchvision"] = ratio["torchvision"]["dali"]
    benchmark.extra_info["times_slower_than_memory"] = ratio["dali"]["memory"]
