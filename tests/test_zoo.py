"""The processes and teachers that come with distpro."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from distpro import Process, zoo
from distpro.console import Console
from distpro.errors import UserError
from distpro.flags import parse
from distpro.job import Job
from distpro.models import create_model, save_weights
from distpro.pathways import all_pathways


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


def test_a_reader_that_leaves_early_sees_no_traceback():
    program = f"{sys.executable} -m distpro.zoo --json"
    done = subprocess.run(["bash", "-c", f"{program} | true"], capture_output=True, text=True)
    assert done.stderr == ""
