"""The processes and teachers that come with distpro."""

import json
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from commands import called
from measured import measured
from safetensors.torch import save_file

from distpro import Process, zoo
from distpro.console import Console
from distpro.errors import UserError
from distpro.flags import parse
from distpro.job import Job
from distpro.models import create_model, save_weights
from distpro.pathways import all_pathways
from distpro.zoo.__main__ import main


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A zoo of its own, with one process and one teacher."""
    monkeypatch.setattr(zoo, "KINDS", {kind: tmp_path / kind for kind in zoo.KINDS})
    Process(torch.rand(3, 16), all_pathways(4, 4, "E"), facts={"teacher": "a"}).save(
        tmp_path / "process/my.safetensors"
    )
    save_weights(create_model("resnet8", 10, 1).half(), tmp_path / "teacher/digits/resnet8.safetensors")
    return tmp_path


def test_a_job_takes_both(shelf):
    job = Job(
        parse(
            ["--teacher", "zoo:digits/resnet8", "--student", "wrn_10_1", "--process", "zoo:my", "--method", "distpro"]
        ),
        Console(),
    )
    assert job.teacher_ready
    assert job.given is not None
    assert job.given.facts == {"teacher": "a"}
    weights = next(job.teacher.parameters())
    assert weights.dtype == torch.float32  # kept in half precision, run in float32
    assert torch.equal(weights, weights.half().float())
    final = Job(parse(["--process", "final:zoo:my", "--method", "distpro"]), Console()).given
    assert final is not None
    assert len(final) == 1


def test_unknown_names(shelf):
    with pytest.raises(UserError, match="unknown process of the zoo 'mi': did you mean 'my'"):
        zoo.find("process", "zoo:mi")
    with pytest.raises(UserError, match="unknown teacher of the zoo 'digits/resnet9': did you mean 'digits/resnet8'"):
        Job(parse(["--teacher", "zoo:digits/resnet9"]), Console())


def test_what_a_file_says_of_itself(shelf):
    assert zoo.facts("process", "my") == {"teacher": "a"}
    save_file({"w": torch.ones(1)}, shelf / "teacher/x.safetensors", metadata={"facts": '{"top1": 70.0}'})
    assert zoo.facts("teacher", "x") == {"top1": 70.0}
    assert zoo.facts("teacher", "digits/resnet8") == {}


def test_the_command_lists_what_there_is():
    done = subprocess.run([sys.executable, "-m", "distpro.zoo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = json.loads(subprocess.run([sys.executable, "-m", "distpro.zoo", "--json"], capture_output=True).stdout)
    for kind in zoo.KINDS:
        assert set(known[kind]) == set(zoo.names(kind))
        for name, facts in known[kind].items():
            assert name in done.stdout
            assert facts, name  # nothing of unknown origin


def show(*words):
    return called(main, *words)


def test_the_command_shows_one_process(tmp_path):
    z = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    Process(z, ("t1-s1-E", "t1-s2-E"), "softmax", 0.4, {"teacher": "a"}).save(tmp_path / "my.safetensors")
    done = show(tmp_path / "my.safetensors", "--figure", tmp_path / "my.svg")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.replace("│", " ").splitlines()]
    softmax = torch.softmax(torch.tensor([3.0, 0.0]), 0)
    assert ["t1-s1-E", "0.5000"] in [line[:2] for line in lines]
    assert ["t1-s2-E", "0.5000", "0.3208", "0.1824", "-", "-"] in lines
    assert next(line for line in lines if line[:1] == ["t1-s1-E"])[-1] == f"{softmax[0]:.4f}"
    assert ["teacher:", "a"] in lines
    first = (tmp_path / "my.svg").read_bytes()
    assert b"t1-s2-E" in first
    assert json.loads(show(tmp_path / "my.safetensors", "--json").stdout)["weights"]["t1-s2-E"][3:] == [0, 0]
    assert show(tmp_path / "my.safetensors", "--figure", tmp_path / "my.svg").returncode == 0
    assert (tmp_path / "my.svg").read_bytes() == first


def test_what_the_command_refuses(tmp_path):
    for words, sentence in (
        (("zoo:cifar100/resnet56-resnet20-trial",), "did you mean 'cifar100/resnet56-resnet20-trials'"),
        ((tmp_path / "none.safetensors",), "no process file"),
        (("--figure", tmp_path / "my.svg"), "--figure draws one process"),
        (("zoo:cifar100/resnet56-resnet20-trials", "--figure", tmp_path / "my.swg"), "an ending such as .svg"),
    ):
        done = show(*words)
        assert done.returncode == 2, words
        assert sentence in done.stderr
        assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_sees_no_traceback():
    program = f"{sys.executable} -m distpro.zoo --json"
    done = subprocess.run(["bash", "-c", f"{program} | true"], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize("name", zoo.names("process"))
def test_what_a_process_led_to_is_what_was_measured(name):
    facts = zoo.facts("process", name)
    for key in ("top1", "top1_uniform"):
        top1 = measured(facts["measured"]["csv"], **facts["measured"][key])
        assert facts[key] == round(fmean(top1.values()), 2)
