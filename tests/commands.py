"""Commands as a user calls them."""

import subprocess
import sys

import pytest

import distpro.train
from distpro.errors import run_command

SHORT = ["--teacher", "resnet8", "--student", "wrn_10_1", "--batch-size", "64"]
SHORT += ["--epochs", "1", "--search-epochs", "1", "--teacher-epochs", "2"]


def run(*words, module="distpro.train"):
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, timeout=300)


def mistake(*words):
    """The one sentence that these words of a command line earn; the exit code is checked."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distpro.train", *map(str, words)])
        patch.setattr("distpro.errors.print", lambda line, **_: lines.append(line), raising=False)
        with pytest.raises(SystemExit) as left:
            run_command(distpro.train.main)
    assert left.value.code == 2
    assert len(lines) == 1
    return lines[0].removeprefix("distpro: error: ")
