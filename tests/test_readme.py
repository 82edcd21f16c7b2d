"""What the README says is so."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from distpro.config import Config
from distpro.flags import parse
from distpro.sweep import Arguments

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    exec(code, scope)
    assert (tmp_path / "student.pt").stat().st_size > 1000
    assert scope["process"].z.shape == (2 * len(scope["batches"]), 9)
    assert scope["losses"]["task"] < 1.0  # it learned: chance is 2.3


def commands():
    block = next(b for b in re.findall(r"```\n(.*?)```", README, re.S) if "--method" in b)
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split()[3:] for line in lines if line.startswith("python -m distpro.train")]


@pytest.mark.parametrize("words", [c for c in commands() if "--config" not in c], ids=" ".join)
def test_every_flag_shown_is_one(words):
    parse(words)


def test_every_flag_named_anywhere_is_one():
    known = {"--" + field.name.replace("_", "-") for kind in (Config, Arguments) for field in fields(kind)}
    known |= {"--help", "--steps", "--trace"}  # distpro.profile has the last two
    known |= {"--nproc-per-node", "--benchmark-only"}  # of torchrun, of pytest
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= known
