"""Images that grow in the course of a distillation."""

import gc
import weakref

import pytest
import timm
import torch
from drawn import LOADERS, save
from safetensors.torch import load_file

from distpro import Distiller
from distpro.console import Console
from distpro.data import ProgressiveResizing, create_dataset
from distpro.errors import UserError
from distpro.flags import parse
from distpro.job import Job
from distpro.models import create_model, save_weights
from distpro.phases import run_method
from distpro.run_folder import open_folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """Four classes, each a texture, in images of many shapes."""
    root = tmp_path_factory.mktemp("textures")
    for i in range(60):
        save(root / f"{'abcd'[i % 4]}/{i:02}.jpg", i % 4, size=(90 + i, 130 - i), quality=60 + i % 30)
    return root


def job(root, *words):
    usual = ["--dataset", "folder", "--data", root, "--image-size", 48, "--workers", 0, "--batch-size", 8]
    usual += ["--teacher", "resnet8", "--student", "wrn_10_1", "--lr", 0.05, "--transforms", "AE", "--device", "cpu"]
    return Job(parse(list(map(str, [*usual, *words]))), Console())


@pytest.mark.parametrize("loader", LOADERS)
def test_the_training_is_divided_evenly_by_whole_epochs(textures, loader):
    batches = job(textures, "--loader", loader, "--size-schedule", 24, 32, 48, "--epochs", 7).student_loader
    seen = [[x for x, _ in batches] for _ in range(7)]
    sides = [24, 24, 24, 32, 32, 48, 48]
    assert [{tuple(x.shape) for x in epoch} for epoch in seen] == [{(8, 3, side, side)} for side in sides]
    assert {len(epoch) for epoch in seen} == {len(batches)} == {6}
    # an epoch is that of a loader of its size, and the same after a resumption
    plain = job(textures, "--loader", loader, "--image-size", 32).loader
    plain.set_epoch(4)
    again = job(textures, "--loader", loader, "--size-schedule", 24, 32, 48, "--epochs", 7).student_loader
    again.set_epoch(4)
    for x, (y, _), (z, _) in zip(seen[4], plain, again, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_loader_of_a_size_is_let_go(textures, loader):
    """With its processes, or the memory that DALI holds: not when the garbage of Python happens to be collected."""
    split = create_dataset("folder", textures, image_size=48, num_workers=1, loader=loader).train
    made = []

    def read(side):
        loader = split.sized(side).loader(8, shuffle=True, augment=True)
        made.append(weakref.ref(loader))
        return loader

    batches = ProgressiveResizing(read, [24, 32], 2)
    gc.disable()
    try:
        for _ in range(2):
            assert len(list(batches)) == 6
        gone = [loader() is None for loader in made]
    finally:
        gc.enable()
    assert gone == [True, False]


@pytest.mark.parametrize("dataset", ["digits", "folder"])
def test_images_in_memory_and_noise_grow_too(dataset):
    split = create_dataset(dataset, loader="synthetic" if dataset == "folder" else None).train
    batches = ProgressiveResizing(lambda side: split.sized(side).loader(4, shuffle=False, augment=False), [16, 24], 2)
    assert [next(iter(batches))[0].shape[-1] for _ in range(2)] == [16, 24]


@pytest.mark.parametrize("method", ["distpro", "reviewkd"])
def test_maps_are_compared_at_the_teachers_size_of_today(method):
    x, y = torch.randn(4, 3, 24, 24), torch.randint(5, (4,))
    made = []
    for side in (48, 24):
        torch.manual_seed(0)
        networks = create_model("wrn_10_1", 5), create_model("resnet8", 5)
        options = {"transforms": "ABCDET"} if method == "distpro" else {}
        made.append(Distiller(*networks, image=(3, side, side), method=method, **options))
    made[0].load_state_dict(made[1].state_dict())
    losses = [distiller(x, y, 1.0) for distiller in made]
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-6, atol=0)


def test_a_vit_resizes_its_position_embedding():
    grows = create_model("vit_tiny_patch16_224", 5, image_size=48).eval()
    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=48).eval()
    fixed.load_state_dict(grows.state_dict())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(grows(x), fixed(x), rtol=0, atol=0)
    networks = create_model("wrn_10_1", 5), grows
    distiller = Distiller(*networks, image=(3, 48, 48), transforms="T")
    losses = [distiller(torch.randn(2, 3, side, side), torch.randint(5, (2,)), 1.0)["loss"] for side in (32, 48, 64)]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_training_goes_on_to_the_same_numbers_and_learns(textures, loader, tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    save_weights(create_model("resnet8", 4), teacher)
    words = ["--teacher-checkpoint", teacher]
    words += ["--method", "distpro", "--process", "uniform"]
    words += ["--loader", loader, "--epochs", 5, "--size-schedule", 24, 48]

    def run(name, *more):
        made = job(textures, *words, "--output", tmp_path / name, *more)
        open_folder(made.folder, made.config)
        return run_method(made, "distpro")

    whole = run("whole")["history"]

    def stopped(self, row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Console, "epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("torn")
    torn = run("torn", "--resume")["history"]
    times = ("seconds", "wait_seconds")
    for row in (*whole, *torn):
        for name in times:
            row.pop(name)
    assert torn == whole
    students = [load_file(tmp_path / name / "student.safetensors") for name in ("whole", "torn")]
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())
    assert whole[-1]["train_task"] < whole[0]["train_task"]
    assert whole[-1]["test_top1"] > 50  # chance is 25


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--student", "levit_128s", "--size-schedule", "32", "48"],
            "^--size-schedule 32 does not work with the student: "
            r"LevitDistilled does not run on images of shape \[3, 32, 32\]",
        ),
        (["--size-schedule", "48", "-5"], "^--size-schedule must be 1 or more, got -5"),
        (["--size-schedule", "24", "32", "48", "--epochs", "2"], "^--size-schedule has 3 sizes: expected at most one"),
        (
            ["--size-schedule", "24", "48", "--process", "online"],
            "^--size-schedule is not supported with --process online",
        ),
    ],
)
def test_mistakes_are_found_before_work_begins(textures, words, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        job(textures, "--loader", "torchvision", *words)
    assert "\n" not in str(caught.value)
