"""Data sets that are files: decoding, labels, damage, and the real ones where they are at hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import IMAGENET, LOADERS, SHARED, needs_dali, save
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as TF

from distpro.data import MEAN, STD, create_dataset, holdout
from distpro.data.images import decoded, draw, random_resized_crop_box
from distpro.errors import UserError


def test_folder_keeps_labels_and_matches_torchvision(photos):
    data = create_dataset("folder", photos, num_workers=0, loader="torchvision")
    assert (data.name, data.shape, data.class_names) == ("folder", (3, 224, 224), ("ant", "bee", "cat"))
    assert data.train.labels.bincount().tolist() == [6, 6, 6]
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    x, _ = next(iter(data.train.loader(18, shuffle=False, augment=False)))
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    for row, file in ((0, "ant/0.jpg"), (5, "ant/grey.jpeg"), (11, "bee/print.JPG"), (17, "cat/clear.png")):
        image = Image.open(photos / "train" / file).convert("RGB")
        torch.testing.assert_close(x[row], IMAGENET(usual(image)), atol=2e-6, rtol=0)
    x, _ = next(iter(data.train.loader(18, shuffle=False, augment=True)))
    assert x.shape == (18, 3, 224, 224)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 900)])
def test_random_windows_are_spread_as_torchvisions(width, height):
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    windows = torch.tensor([random_resized_crop_box(width, height, draw(seed)) for seed in range(3000)]).T
    left, top, right, bottom = windows
    assert (left.min(), top.min()) >= (0, 0)
    assert (right.max(), bottom.max()) <= (width, height)
    theirs = [RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    y, x, h, w = torch.tensor(theirs).T
    scale = torch.tensor([width, height, width, height]).view(4, 1)
    ours, theirs = (torch.stack(v) / scale for v in ((left, top, right - left, bottom - top), (x, y, w, h)))
    torch.testing.assert_close(ours.mean(1), theirs.mean(1), atol=0.02, rtol=0)
    torch.testing.assert_close(ours.std(1), theirs.std(1), atol=0.02, rtol=0)


@pytest.mark.parametrize("loader", LOADERS)
def test_small_images_are_shifted_and_flipped(tmp_path, loader):
    for i in range(8):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.png", i, size=(48, 48))
    data = create_dataset("folder", tmp_path, num_workers=0, loader=loader)
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


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_any_mean_and_std(photos, loader, augment):
    def read(**options):
        train = create_dataset("folder", photos, image_size=48, num_workers=0, loader=loader, **options).train
        return next(iter(train.loader(18, shuffle=False, augment=augment)))[0]

    mean, std = torch.tensor([[0.1, 0.5, 0.6], [0.5, 0.25, 0.125]]).view(2, 3, 1, 1)
    pixels = read() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    x = read(mean=(0.1, 0.5, 0.6), std=(0.5, 0.25, 0.125))
    torch.testing.assert_close(x, (pixels - mean) / std, atol=2e-5, rtol=0)
    with pytest.raises(UserError, match=r"std 1 0 1: expected three numbers above 0"):
        read(std=(1, 0, 1))


def test_the_mean_of_a_data_set_in_memory_is_its_own():
    with pytest.raises(UserError, match="data set 'digits' has a mean and std of its own"):
        create_dataset("digits", mean=MEAN)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_image_is_named(tmp_path, loader, workers):
    for i in range(12):
        save(tmp_path / f"{'ab'[i % 2]}/{i}.jpg", i, size=(80, 80))
    train = create_dataset("folder", tmp_path, image_size=32, num_workers=workers, loader=loader).train
    damaged = tmp_path / os.fsdecode(train.files[7])
    damaged.write_bytes(damaged.read_bytes()[:-200])
    loader = train.loader(2, shuffle=False, augment=True)
    for _ in range(2):  # the workers survive it
        with pytest.raises(UserError, match=f"^cannot read image '{damaged}': .*truncated.*$") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
    first = tmp_path / os.fsdecode(train.files[0])
    first.write_text("not an image")
    with pytest.raises(UserError, match=f"cannot read image '{first}'"):
        create_dataset("folder", tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_16_bits_a_pixel_are_as_bright_as_8(tmp_path, loader):
    grey = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(grey).save(tmp_path / name / f"{i}.png")
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name / "wide.png")
    split = create_dataset("folder", tmp_path, image_size=40, num_workers=0, loader=loader).train
    images = [x for x, _ in split.loader(1, shuffle=False, augment=False)]
    assert any(b"wide" in file for file in split.files)
    for x in images:
        torch.testing.assert_close(x, images[0], rtol=0, atol=0.02)


def test_an_image_of_32_bits_a_pixel_is_refused(tmp_path):
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(UserError, match=r"1\.tif': it has 32 bits per pixel, expected 8 or 16"):
        decoded(os.fsencode(tmp_path / "1.tif"))


@needs_dali
def test_dali_is_not_given_tiffs(tmp_path):
    """It turned some by 90 degrees, and made others half as bright, without an error."""
    for name in "ab":
        for i in range(5):
            save(tmp_path / name / f"{i}.tif", i)
    with pytest.raises(UserError, match=r"unlike Pillow \('a/.*tif'\): give --loader torchvision"):
        create_dataset("folder", tmp_path, loader="dali")
    assert len(create_dataset("folder", tmp_path, loader="torchvision").train) == 8


def test_a_thumbnail_at_the_head_does_not_speak_for_the_rest(tmp_path):
    for name in "ab":
        for i in range(10):
            save(tmp_path / name / f"{i}.jpg", i, size=(300, 200) if i else (64, 64))
    assert create_dataset("folder", tmp_path).shape == (3, 224, 224)


@pytest.mark.parametrize("loader", LOADERS)
def test_one_pass_at_a_time(photos, loader):
    train = create_dataset("folder", photos, image_size=32, num_workers=0, loader=loader).train
    loader = train.loader(2, shuffle=True, augment=True)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="this iterator is no longer valid"):
        next(first)


def test_folders_that_are_none(tmp_path):
    def refused(match: str, root: Path = tmp_path / "set") -> None:
        with pytest.raises(UserError, match=match):
            create_dataset("folder", root)

    (tmp_path / "beside/photos0").mkdir(parents=True)
    refused("no folder '.*/photos': did you mean '.*/photos0'", tmp_path / "beside/photos")
    (tmp_path / "set/train/ant").mkdir(parents=True)
    (tmp_path / "set/validation/ant").mkdir(parents=True)
    refused("neither 'val' nor 'test' \\(rename 'validation'")
    (tmp_path / "set/validation").rename(tmp_path / "set/test")
    refused(r"no images \(.jpg .*\) in class folder '.*/set/train/ant'")
    save(tmp_path / "set/train/ant/0.jpg", 0)
    save(tmp_path / "set/test/aunt/0.jpg", 0)
    (tmp_path / "set/test/ant").rmdir()
    refused("unknown class 'aunt': did you mean 'ant'")
    (tmp_path / "set/test/aunt").rename(tmp_path / "set/test/ant")
    assert len(create_dataset("folder", tmp_path / "set").test) == 1
    save(tmp_path / "set/train/ant/young/0.jpg", 0)
    save(tmp_path / "set/train/ant/.thumbs/0.jpg", 0)  # hidden: no matter
    (tmp_path / "set/train/ant/no.png").mkdir()  # nor an empty folder, whatever its name
    refused("class folder '.*/ant' holds images and a folder 'young' of images")
    (tmp_path / "set/train/ant/no.png").rmdir()
    (tmp_path / "set/train/ant/young").rename(tmp_path / "set/train/__unknown__")
    assert create_dataset("folder", tmp_path / "set").num_classes == 2
    shutil.rmtree(tmp_path / "set/train/__unknown__")
    refused("no class folders", tmp_path / "set/train/ant")
    refused("too few to split", tmp_path / "set/train")


@pytest.mark.parametrize("loader", LOADERS)
def test_tiny_imagenet_layout(tmp_path, loader):
    for i in range(6):
        name = f"n0{i % 3}"
        save(tmp_path / f"train/{name}/images/{name}_{i}.JPEG", i, size=(64, 64), mode="L" if i else "RGB")
        (tmp_path / f"train/{name}/{name}_boxes.txt").touch()
        save(tmp_path / f"val/images/val_{i}.JPEG", i, size=(64, 64))
    notes = tmp_path / "val/val_annotations.txt"
    notes.write_text("".join(f"val_{i}.JPEG\tn0{2 - i % 3}\t0\t0\t9\t9\n" for i in range(6)))
    data = create_dataset("folder", tmp_path, num_workers=0, loader=loader)
    assert (data.shape, data.class_names) == ((3, 64, 64), ("n00", "n01", "n02"))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [2, 1, 0, 2, 1, 0])
    x, _ = next(iter(data.test.loader(6, shuffle=False, augment=False)))
    image = TF.to_dtype(TF.pil_to_tensor(Image.open(tmp_path / "val/images/val_3.JPEG")), scale=True)
    torch.testing.assert_close(x[3], IMAGENET(image), atol=2e-6, rtol=0)
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
@pytest.mark.parametrize("loader", LOADERS)
def test_real_tiny_imagenet(tmp_path, loader):
    root = unpacked("tiny-imagenet", tmp_path) / "tiny-imagenet-200"
    data = create_dataset("folder", root, loader=loader)
    assert (data.num_classes, data.shape) == (20, (3, 64, 64))
    assert data.train.labels.bincount().tolist() == [500] * 20
    assert data.test.labels.bincount().tolist() == [50] * 20
    batches = list(data.test.loader(100, shuffle=True, augment=True))
    assert sum(len(y) for _, y in batches) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_real_full_size_images(loader):
    root = SHARED / "data/imagenet-sample/images"
    if not root.is_dir():
        pytest.skip("imagenet-sample is not at hand: expected it in ../shared/data")
    data = create_dataset("folder", root, loader=loader)
    assert (data.num_classes, data.shape, len(data.train), len(data.test)) == (300, (3, 224, 224), 240, 60)
    for augment in (True, False):
        assert sum(len(y) for _, y in data.test.loader(20, shuffle=False, augment=augment)) == 60
