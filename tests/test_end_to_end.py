"""A folder of JPEGs, DALI and two networks of timm, as a user types it: killed twice, to the same numbers."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from drawn import SHARED, needs_dali, save
from safetensors.torch import load_file

from distpro import Process

TIMES = {"seconds", "wait_seconds"}  # of summary.csv: all that may differ
DEADLINE = 300  # seconds
WORDS = ["--dataset", "folder", "--loader", "dali", "--workers", "1", "--device", "cpu", "--threads", "1"]
WORDS += ["--teacher", "timm:resnet10t", "--student", "timm:mobilenetv3_small_050", "--image-size", "32"]
WORDS += ["--method", "distpro", "--teacher-epochs", "1", "--search-epochs", "2", "--epochs", "2", "--lr", "0.02"]
WORDS += ["--search-by", "gradient"]  # which has the most to resume


def begun(*words):
    command = [sys.executable, "-m", "distpro.train", *WORDS, *map(str, words)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(job):
    out, err = job.communicate(timeout=DEADLINE)
    assert job.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def killed_in_the_second_epoch(job, part, by=signal.SIGKILL):
    """Kill `job` a third into its second epoch of `part`; gives the lines that it said until then."""
    started = time.monotonic()
    said = ""
    for line in job.stdout:
        said += line
        if line.startswith(part) and "epoch   1" in line:
            break
        started = time.monotonic()
    else:
        raise AssertionError(said + job.stderr.read())
    time.sleep((time.monotonic() - started) / 3)
    job.send_signal(by)
    rest, error = job.communicate(timeout=DEADLINE)
    if by == signal.SIGTERM:
        assert job.returncode == 130
        assert "distpro: interrupted; continue with --resume --output" in error
    else:
        assert job.returncode < 0
    assert f"{part:<12} epoch   2" not in rest
    return said


def numbers(folder):
    """What a run comes to: its process, its student, and its rows without the times."""
    with (folder / "summary.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return Process.load(folder / "process.safetensors").z, load_file(folder / "student.safetensors"), rows


def same_after_two_deaths(tmp_path, *words):
    words = [*words, "--output"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    expected = finished(begun(*words, whole))

    killed_in_the_second_epoch(begun(*words, torn), "search")
    assert (torn / "search.pt").is_file()
    assert not (torn / "process.safetensors").exists()
    said = killed_in_the_second_epoch(begun(*words, torn, "--resume"), "distpro", signal.SIGTERM)
    assert "teacher: " in said
    assert "search: " in said  # of so many steps are already done
    assert not (torn / "student.safetensors").exists()
    (torn / ".last.pt.abc.part").touch()  # what a death while saving leaves
    result = finished(begun(*words, torn, "--resume"))
    assert not list(torn.rglob(".*"))

    for name in ("teacher_top1", "top1", "top5"):
        assert result[name] == expected[name]
    (z, student, rows), (other_z, other_student, other_rows) = numbers(torn), numbers(whole)
    assert torch.equal(z, other_z)
    assert (z[:, :-1] != 1).any(0).all()
    assert (z[:, -1] == 1).all()  # t5-s5 has the weight of teacher stage 5 to itself
    assert student.keys() == other_student.keys()
    assert all(torch.equal(value, other_student[key]) for key, value in student.items())
    assert rows == other_rows
    return rows


@needs_dali
@pytest.mark.slow
def test_drawn_images(tmp_path):
    for part, count in (("train", 40), ("val", 10)):
        for label in range(4):
            for i in range(count):  # a texture a class, in shapes that differ a little
                file = tmp_path / f"data/{part}/{'abcd'[label]}/{i}.jpg"
                save(file, label, size=(40 + i % 7, 40), quality=70 + i % 9)
    first, second = same_after_two_deaths(tmp_path, "--data", tmp_path / "data", "--batch-size", 8)
    assert float(second["test_loss"]) < float(first["test_loss"])


@needs_dali
@pytest.mark.slow
def test_tiny_imagenet(tmp_path):
    if not (SHARED / "data/tiny-imagenet").is_dir():
        pytest.skip("tiny-imagenet is not at hand: expected it in ../shared/data")
    tool = [sys.executable, str(SHARED / "tools/unpack_data.py"), "tiny-imagenet", str(tmp_path)]
    subprocess.run(tool, check=True, capture_output=True)
    data = tmp_path / "tiny-imagenet-200"
    first, second = same_after_two_deaths(tmp_path, "--data", data, "--train-samples", 240, "--batch-size", 16)
    assert float(second["train_task"]) < float(first["train_task"])  # the test loss of 240 images rises on some CPUs
