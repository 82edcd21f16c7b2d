"""Data sets: what is read, how it is shuffled, cropped and split, and what is said where that is impossible."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from distpro.data import create_dataset, holdout
from distpro.data.base import Split
from distpro.data.pictures import random_window
from distpro.data.resident import Recipe, draw
from distpro.errors import UserError

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
IMAGENET = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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
    """A folder of random pictures as published; also {file: (labels, pixels [rows, 3072])}."""
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


def save(file: Path, seed: int, size=(24, 20), mode="RGB", **options) -> None:
    """A smooth random picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(file, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """An ImageFolder of three classes, with the kinds of pictures that are found in the wild."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                save(root / part / name / f"{i}.jpg", 100 * label + i, size=(90, 70 + i))
    save(root / "train/ant/grey.jpeg", 1, mode="L")
    save(root / "train/bee/print.JPG", 2, mode="CMYK", size=(300, 60))
    save(root / "train/cat/clear.png", 3, mode="RGBA")
    (root / "train/cat/notes.txt").write_text("no picture")
    (root / "train/.cache").mkdir()
    return root


@pytest.fixture(scope="module", params=["digits", "cifar100", "resized", "folder", "folder-workers"])
def split(request, tmp_path_factory, photos) -> Split:
    if request.param == "digits":
        return create_dataset("digits").train.subset(range(300))
    if request.param.startswith("folder"):
        return create_dataset("folder", photos, image_size=32, num_workers=2 * ("-" in request.param)).train
    root, _ = write_cifar(tmp_path_factory.mktemp("cifar"), "cifar100", "binary")
    return create_dataset("cifar100", root, image_size=24 if request.param == "resized" else None).train


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def seen(batches) -> Counter:
    """How often each (picture, label) came."""
    return Counter((x.numpy().tobytes(), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True))


# What every split promises


def test_an_epoch_is_the_same_whatever_was_read_before(split):
    def loader():
        return split.loader(7, shuffle=True, augment=True, seed=3)

    first, second = loader(), loader()
    epochs = [list(first) for _ in range(3)]  # every pass takes the next epoch
    assert len(epochs[0]) == len(first) == -(-len(split) // 7)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    next(iter(second))  # a pass that is left early
    assert same(list(second), epochs[1])
    second.set_epoch(2, start_step=2)
    assert same(list(second), epochs[2][2:])
    second.set_epoch(0, start_step=len(second))
    assert list(second) == []
    assert same(list(second), epochs[1])
    assert torch.equal(state, torch.get_rng_state())  # and it takes nothing from the global generator
    assert seen(epochs[0]) != seen(epochs[1]) != seen(epochs[2])  # cropped anew, not only shuffled anew
    assert not same(list(split.loader(7, shuffle=True, augment=True, seed=4)), epochs[0])
    x, y = epochs[0][0]
    assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.float32, torch.int64, True)


def test_an_epoch_is_every_picture_once_with_its_label(split):
    plain = list(split.loader(7, shuffle=False, augment=False))
    assert torch.equal(torch.cat([y for _, y in plain]), split.labels)
    shuffled = list(split.loader(11, shuffle=True, augment=False))
    assert seen(shuffled) == seen(plain)
    assert not torch.equal(torch.cat([y for _, y in shuffled]), split.labels)
    rows = torch.tensor([5, 0, 11])
    assert seen(split.subset(rows).loader(3, shuffle=False, augment=False)) == seen(
        [tuple(torch.cat(parts)[rows] for parts in zip(*plain, strict=True))]
    )
    assert len(split.loader(7, shuffle=True, augment=False, drop_last=True)) == len(split) // 7
    assert {len(y) for _, y in split.loader(7, shuffle=True, augment=True, drop_last=True)} == {7}


def test_what_no_loader_can_do(split):
    with pytest.raises(UserError, match=f"larger than the {len(split)} pictures"):
        split.loader(len(split) + 1, shuffle=True, augment=True, drop_last=True)
    with pytest.raises(UserError, match="expected at least 1"):
        split.loader(0, shuffle=True, augment=True)
    with pytest.raises(UserError, match="empty subset"):
        split.subset([])
    with pytest.raises(IndexError):
        split.subset([len(split)])
    with pytest.raises(UserError, match="outside an epoch of 1 steps"):
        split.loader(len(split), shuffle=True, augment=True).set_epoch(0, start_step=2)


def test_holdout_is_balanced_and_leaks_nothing():
    data = create_dataset("digits").train
    train, val = holdout(data, 0.25, seed=1)
    counts, held = data.labels.bincount(), val.labels.bincount()
    assert (held - counts * 0.25).abs().max() < 1
    assert (len(train), len(val)) == (len(data) - len(data) // 4, len(data) // 4)
    every, *parts = (seen(part.loader(99, shuffle=False, augment=False)) for part in (data, train, val))
    assert parts[0] + parts[1] == every
    assert not parts[0] & parts[1]  # no two digits are alike, so this tells
    assert torch.equal(holdout(data, 0.25, seed=1)[1].labels, val.labels)
    assert not torch.equal(holdout(data, 0.25, seed=2)[1].labels, val.labels)
    for fraction in (0, 1, 1e-6):
        with pytest.raises(UserError, match="held-out fraction"):
            holdout(data, fraction)


def test_unknown_names_and_numbers():
    with pytest.raises(UserError, match="did you mean 'cifar100'"):
        create_dataset("cifar-100")
    with pytest.raises(UserError, match="at least 1 pixel"):
        create_dataset("digits", image_size=0)
    with pytest.raises(UserError, match="needs its folder"):
        create_dataset("cifar10")


# Pictures in memory


def test_digits():
    from sklearn.datasets import load_digits

    data = create_dataset("digits")
    assert (data.shape, data.num_classes, len(data.train), len(data.test)) == ((1, 8, 8), 10, 1438, 359)
    loaders = [part.loader(2000, shuffle=False, augment=False) for part in (data.train, data.test)]
    (x, _), (x_test, _) = (next(iter(loader)) for loader in loaders)
    moments = torch.stack([x.mean(), x.std()])  # the constants are those of the train part
    torch.testing.assert_close(moments, torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    raw = torch.cat([x, x_test]).mul(0.3761).add(0.3054).mul(16).round().reshape(-1, 64)
    assert Counter(map(tuple, raw.tolist())) == Counter(map(tuple, load_digits().data.tolist()))
    assert data.test.labels[:9].tolist() == [0, 1, 7, 8, 1, 2, 6, 5, 1]
    assert data.test.labels.bincount().tolist() == [35, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert create_dataset("digits", image_size=16).shape == (1, 16, 16)


@pytest.mark.parametrize("image_size", [None, 48])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_crop_is_torchvisions(tmp_path, name, image_size):
    root, written = write_cifar(tmp_path, name, "binary")
    split = create_dataset(name, root, image_size=image_size).train
    loader = split.loader(20, shuffle=False, augment=True, seed=9)
    loader.set_epoch(4)
    x = torch.cat([x for x, _ in loader])
    _, top, left, flip = torch.cat([draw(torch.arange(20), split.recipe, (9, 4, step)) for step in (0, 1)], 1)
    assert not torch.equal(top[:20], top[20:])
    assert len(top.unique()) > 5
    assert 0 < flip.sum() < 40
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    if name == "cifar10":
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    pixels = next(iter(written.values()))[1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert len(x) == 40 * len([*written][:-1])
    for i in range(40):
        picture = TF.pad(Image.fromarray(pixels[i]), 4)  # what RandomCrop(32, padding=4) does
        picture = TF.crop(picture, int(top[i]), int(left[i]), 32, 32)
        picture = TF.to_dtype(TF.to_image(TF.hflip(picture) if flip[i] else picture), torch.float32, scale=True)
        picture = TF.resize(picture, [image_size], antialias=True) if image_size else picture
        torch.testing.assert_close(x[i], TF.normalize(picture, mean, std), atol=2e-6, rtol=0)


def test_offsets_and_flips_are_uniform():
    rows, half = torch.zeros(90000, dtype=torch.int64), (0.5,)
    _, *offsets, flip = draw(rows, Recipe(half, half, padding=4, flip=True), (0, 1, 2))
    for offset in offsets:
        torch.testing.assert_close(offset.bincount() / 10000, torch.ones(9), atol=0.05, rtol=0)
    assert abs(flip.float().mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([*offsets, flip]).float()).fill_diagonal_(0)).max() < 0.02
    _, top, _, flip = draw(rows, create_dataset("digits").train.recipe, (0, 1, 2))
    assert (top.unique().tolist(), flip.sum()) == ([0, 1, 2], 0)  # a mirrored digit is none


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
    refused("lacks train.bin", folder)
    folder, _ = write_cifar(tmp_path, "cifar100", "python")
    whole = (folder / "train").read_bytes()
    for content in (b"", whole[:-100], whole[100:], pickle.dumps([1])):
        (folder / "train").write_bytes(content)
        refused("cannot read '.*train'", folder)
    for content in ({}, {b"data": 1, b"fine_labels": [1]}, {b"data": np.zeros(5, np.uint8), b"fine_labels": [1]}):
        (folder / "train").write_bytes(pickle.dumps(content))
        refused("not a CIFAR batch", folder)


# Pictures in files


def test_folder_keeps_labels_and_matches_torchvision(photos):
    data = create_dataset("folder", photos, num_workers=0)
    assert (data.name, data.shape, data.class_names) == ("folder", (3, 224, 224), ("ant", "bee", "cat"))
    assert data.train.labels.bincount().tolist() == [6, 6, 6]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    x, _ = next(iter(data.train.loader(18, shuffle=False, augment=False)))
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for row, file in ((0, "ant/0.jpg"), (5, "ant/grey.jpeg"), (11, "bee/print.JPG"), (17, "cat/clear.png")):
        picture = Image.open(photos / "train" / file).convert("RGB")
        torch.testing.assert_close(x[row], IMAGENET(usual(picture)), atol=2e-6, rtol=0)
    x, _ = next(iter(data.train.loader(18, shuffle=False, augment=True)))
    assert x.shape == (18, 3, 224, 224)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 900)])
def test_random_windows_are_spread_as_torchvisions(width, height):
    torch.manual_seed(0)
    chance, blank = random.Random(0), torch.empty(1, height, width)
    windows = torch.tensor([random_window(width, height, chance) for _ in range(3000)]).T
    left, top, right, bottom = windows
    assert (left.min(), top.min()) >= (0, 0)
    assert (right.max(), bottom.max()) <= (width, height)
    theirs = [RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    y, x, h, w = torch.tensor(theirs).T
    scale = torch.tensor([width, height, width, height]).view(4, 1)
    ours, theirs = (torch.stack(v) / scale for v in ((left, top, right - left, bottom - top), (x, y, w, h)))
    torch.testing.assert_close(ours.mean(1), theirs.mean(1), atol=0.02, rtol=0)
    torch.testing.assert_close(ours.std(1), theirs.std(1), atol=0.02, rtol=0)


def test_small_pictures_are_shifted_and_flipped(tmp_path):
    for i in range(8):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.png", i, size=(48, 48))
    data = create_dataset("folder", tmp_path, num_workers=0)
    assert data.name == "folder (a fixed fifth held out for test)"
    assert (data.shape, len(data.train), len(data.test)) == ((3, 48, 48), 7, 1)
    plain, _ = next(iter(data.train.loader(7, shuffle=False, augment=False)))
    x, _ = next(iter(data.train.loader(7, shuffle=False, augment=True)))
    black = IMAGENET(torch.zeros(3, 1, 1)).expand(3, 60, 60)
    flips = 0
    for small, shifted in zip(plain, x, strict=True):
        framed = black.clone()
        framed[:, 6:54, 6:54] = small
        every = framed.unfold(1, 48, 1).unfold(2, 48, 1).permute(1, 2, 0, 3, 4)  # 13 x 13 shifts
        hits = [(side - shifted).abs().amax((2, 3, 4)).min() < 1e-5 for side in (every, every.flip(4))]
        assert any(hits)
        flips += int(hits[1])
    assert 0 < flips < 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named(tmp_path, workers):
    for i in range(12):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.jpg", i, size=(80, 80))
    train = create_dataset("folder", tmp_path, image_size=32, num_workers=workers).train
    damaged = tmp_path / os.fsdecode(train.files[7])
    damaged.write_bytes(damaged.read_bytes()[:-200])
    loader = train.loader(2, shuffle=False, augment=True)
    for _ in range(2):  # the workers survive it
        with pytest.raises(UserError, match=f"^cannot read picture '{damaged}': .*truncated.*$") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
    first = tmp_path / os.fsdecode(train.files[0])
    first.write_text("not a picture")
    with pytest.raises(UserError, match=f"cannot read picture '{first}'"):
        create_dataset("folder", tmp_path)


def test_one_pass_at_a_time(photos):
    loader = create_dataset("folder", photos, image_size=32, num_workers=0).train.loader(2, shuffle=True, augment=True)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="this pass is over"):
        next(first)


def test_folders_that_are_none(tmp_path, photos):
    def refused(match: str, root: Path = tmp_path / "set") -> None:
        with pytest.raises(UserError, match=match):
            create_dataset("folder", root)

    refused("no folder '.*/photos': did you mean '.*/photos0'", photos.parent / "photos")
    (tmp_path / "set/train/ant").mkdir(parents=True)
    (tmp_path / "set/validation/ant").mkdir(parents=True)
    refused("neither 'val' nor 'test' \\(rename 'validation'")
    (tmp_path / "set/validation").rename(tmp_path / "set/test")
    refused(r"no pictures \(.jpg .*\) in class folder '.*/set/train/ant'")
    save(tmp_path / "set/train/ant/0.jpg", 0)
    save(tmp_path / "set/test/aunt/0.jpg", 0)
    (tmp_path / "set/test/ant").rmdir()
    refused("unknown class 'aunt': did you mean 'ant'")
    (tmp_path / "set/test/aunt").rename(tmp_path / "set/test/ant")
    assert len(create_dataset("folder", tmp_path / "set").test) == 1
    refused("no class folders", tmp_path / "set/train/ant")
    refused("too few to split", tmp_path / "set/train")


def test_tiny_imagenet_layout(tmp_path):
    for i in range(6):
        name = f"n0{i % 3}"
        save(tmp_path / f"train/{name}/images/{name}_{i}.JPEG", i, size=(64, 64), mode="L" if i else "RGB")
        (tmp_path / f"train/{name}/{name}_boxes.txt").touch()
        save(tmp_path / f"val/images/val_{i}.JPEG", i, size=(64, 64))
    notes = tmp_path / "val/val_annotations.txt"
    notes.write_text("".join(f"val_{i}.JPEG\tn0{2 - i % 3}\t0\t0\t9\t9\n" for i in range(6)))
    data = create_dataset("folder", tmp_path, num_workers=0)
    assert (data.shape, data.class_names) == ((3, 64, 64), ("n00", "n01", "n02"))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 0])
    x, _ = next(iter(data.test.loader(6, shuffle=False, augment=False)))
    picture = TF.to_dtype(TF.pil_to_tensor(Image.open(tmp_path / "val/images/val_3.JPEG")), scale=True)
    torch.testing.assert_close(x[3], IMAGENET(picture), atol=2e-6, rtol=0)
    for line, match in (("val_9.JPEG\tn01", "'val_9.JPEG': expected it in"), ("val_1.JPEG\tn1", "line 1.*n01")):
        notes.write_text(line)
        with pytest.raises(UserError, match=match):
            create_dataset("folder", tmp_path)


# Real data, where it is at hand


def unpacked(name: str, place: Path, *options: str) -> Path:
    if not (SHARED / "data" / name).is_dir():
        pytest.skip(f"{name} is not at hand: expected it in ../shared/data")
    tool = [sys.executable, str(SHARED / "tools/unpack_data.py"), name, str(place), *options]
    subprocess.run(tool, check=True, capture_output=True)
    return place


@pytest.mark.slow
def test_real_cifar100(tmp_path):
    data, python = (
        create_dataset("cifar100", unpacked("cifar100", tmp_path / layout, "--layout", layout, "--per-class", "20"))
        for layout in ("binary", "python")
    )
    assert data.class_names == python.class_names
    assert data.class_names[:2] == ("apple", "aquarium_fish")
    for split, other, count in ((data.train, python.train, 20), (data.test, python.test, 100)):
        assert split.labels.bincount().tolist() == [count] * 100
        assert torch.equal(split.labels, other.labels)
        assert torch.equal(split.padded, other.padded)
    batches = list(data.test.loader(500, shuffle=False, augment=False))
    moments = torch.stack(torch.std_mean(torch.cat([x for x, _ in batches]), (0, 2, 3)))
    torch.testing.assert_close(moments, torch.tensor([[1.0] * 3, [0.0] * 3]), atol=0.02, rtol=0)
    train, val = holdout(data.train)
    assert train.labels.bincount().tolist() == [16] * 100
    assert val.labels.bincount().tolist() == [4] * 100


@pytest.mark.slow
def test_real_tiny_imagenet(tmp_path):
    root = unpacked("tiny-imagenet", tmp_path) / "tiny-imagenet-200"
    data = create_dataset("folder", root)
    assert (data.num_classes, data.shape) == (20, (3, 64, 64))
    assert data.train.labels.bincount().tolist() == [500] * 20
    assert data.test.labels.bincount().tolist() == [50] * 20
    batches = list(data.test.loader(100, shuffle=True, augment=True))
    assert sum(len(y) for _, y in batches) == 1000


@pytest.mark.slow
def test_real_full_size_pictures():
    root = SHARED / "data/imagenet-sample/images"
    if not root.is_dir():
        pytest.skip("imagenet-sample is not at hand: expected it in ../shared/data")
    data = create_dataset("folder", root)
    assert (data.num_classes, data.shape, len(data.train), len(data.test)) == (300, (3, 224, 224), 240, 60)
    for augment in (True, False):
        assert sum(len(y) for _, y in data.test.loader(20, shuffle=False, augment=augment)) == 60
