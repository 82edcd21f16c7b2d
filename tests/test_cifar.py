"""CIFAR: both layouts of its files, sound and not; how its images are cropped and flipped."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import python2, write_cifar
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from distpro.data import create_dataset
from distpro.data.resident import draw
from distpro.errors import UserError


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_layouts_of_cifar_are_read(tmp_path, name):
    folder, written = write_cifar(tmp_path / "binary", name, "binary")
    pickled = [lambda value, p=p: pickle.dumps(value, protocol=p) for p in (2, 4, 5)]
    for i, dumps in enumerate([python2, *pickled]):
        write_cifar(tmp_path / str(i), name, "python", dumps=dumps)
    files = list(written)
    expected = [np.concatenate([written[f][k] for f in files[:-1]]) for k in (0, 1)], written[files[-1]]
    for root in (folder, tmp_path / "binary", *(tmp_path / str(i) for i in range(4))):
        data = create_dataset(name, root)
        assert (data.shape, data.class_names[3]) == ((3, 32, 32), "3")
        for split, (labels, pixels) in zip((data.train, data.test), expected, strict=True):
            assert np.array_equal(split.labels, labels)
            assert np.array_equal(split.padded[:, :, 4:-4, 4:-4].reshape(-1, 3072), pixels)


class Malice:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_pickle_runs_nothing(tmp_path):
    folder, _ = write_cifar(tmp_path, "cifar100", "python")
    trap, pixels = tmp_path / "trap", np.zeros((2, 3072), np.uint8)
    for value, name in (
        (Malice(os.system, (f"touch {trap}",)), f"'{os.system.__module__}.system'"),
        (Malice(eval, (f"open({str(trap)!r}, 'w')",)), "eval'"),
        (np.zeros(2, object), "an array of 'O8'"),
        (np.zeros(2), "an array of 'f8'"),
    ):
        for protocol in (2, 4):
            content = {b"data": pixels, b"fine_labels": [1, 2], b"extra": [value]}
            (folder / "train").write_bytes(pickle.dumps(content, protocol=protocol))
            with pytest.raises(UserError, match=f"{name}, which is refused") as caught:
                create_dataset("cifar100", folder)
            assert str(folder / "train") in str(caught.value)
            assert not trap.exists()
    (folder / "train").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.")
    with pytest.raises(UserError, match="the codec 'zip'"):
        create_dataset("cifar100", folder)


def test_damaged_and_absent_cifar(tmp_path):
    folder, _ = write_cifar(tmp_path / "sets", "cifar100", "binary")

    def refused(match: str, root: Path, name: str = "cifar100") -> None:
        with pytest.raises(UserError, match=match):
            create_dataset(name, root)

    refused("'.*/sets': expected data_batch_1.bin to data_batch_5.bin and test_batch.bin", folder.parent, "cifar10")
    refused("no folder '.*/set': did you mean '.*/sets'", tmp_path / "set")
    refused("is a file", folder / "test.bin")
    (tmp_path / "cifar-100-python.tar.gz").touch()
    refused("unpack cifar-100-python.tar.gz first", tmp_path)
    (folder / "fine_label_names.txt").write_text("apple bear")
    refused("has 2 class names: expected 100", folder)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-7])
    refused("train.bin' has 122953 bytes: expected a multiple of 3074", folder)
    (folder / "train.bin").write_bytes(b"\0\xff" + whole[2:])
    refused("labels from .* to 255: expected 0 to 99", folder)
    (folder / "train.bin").unlink()
    refused("is missing train.bin", folder)
    folder, _ = write_cifar(tmp_path, "cifar100", "python")
    whole = (folder / "train").read_bytes()
    for content in (b"", whole[:-100], whole[100:], pickle.dumps([1])):
        (folder / "train").write_bytes(content)
        refused("cannot read '.*train'", folder)
    for content in ({}, {b"data": 1, b"fine_labels": [1]}, {b"data": np.zeros(5, np.uint8), b"fine_labels": [1]}):
        (folder / "train").write_bytes(pickle.dumps(content))
        refused("not a CIFAR batch", folder)


@pytest.mark.parametrize("image_size", [None, 48])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_crop_is_torchvisions(tmp_path, name, image_size):
    root, written = write_cifar(tmp_path, name, "binary")
    split = create_dataset(name, root, image_size=image_size).train
    loader = split.loader(20, shuffle=False, augment=True, seed=9)
    loader.set_epoch(4)
    x = torch.cat([x for x, _ in loader])
    _, top, left, flip = torch.cat([draw(torch.arange(20), split.augmentation, (9, 4, step)) for step in (0, 1)], 1)
    assert not torch.equal(top[:20], top[20:])
    assert len(top.unique()) > 5
    assert 0 < flip.sum() < 40
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    if name == "cifar10":
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    pixels = next(iter(written.values()))[1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert len(x) == 40 * len([*written][:-1])
    for i in range(40):
        image = TF.pad(Image.fromarray(pixels[i]), 4)  # what RandomCrop(32, padding=4) does
        image = TF.crop(image, int(top[i]), int(left[i]), 32, 32)
        image = TF.to_dtype(TF.to_image(TF.hflip(image) if flip[i] else image), torch.float32, scale=True)
        image = TF.resize(image, [image_size], antialias=True) if image_size else image
        torch.testing.assert_close(x[i], TF.normalize(image, mean, std), atol=2e-6, rtol=0)


def test_alternating_flips_show_both_sides_in_two_epochs(tmp_path):
    root, _ = write_cifar(tmp_path, "cifar10", "binary")
    split = create_dataset("cifar10", root, alternating_flip=True).train
    split = replace(split, augmentation=replace(split.augmentation, padding=0), padded=split.padded[:, :, 4:-4, 4:-4])
    plain = torch.cat([x for x, _ in split.loader(20, shuffle=False, augment=False)])
    sides = []
    for epoch in range(4):
        loader = split.loader(20, shuffle=False, augment=True, seed=9)
        loader.set_epoch(epoch)
        x = torch.cat([x for x, _ in loader])
        flipped = (x != plain).flatten(1).any(1)
        assert x[flipped].equal(plain[flipped].flip(3))
        sides.append(flipped)
    assert 0.2 < sides[0].float().mean() < 0.8
    assert sides[1].equal(~sides[0])
    assert sides[2].equal(sides[0])
    assert sides[3].equal(sides[1])
    with pytest.raises(UserError, match="data set 'digits' cannot flip in every other epoch"):
        create_dataset("digits", alternating_flip=True)
